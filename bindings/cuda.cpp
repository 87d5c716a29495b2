// lr_kernels::*_cuda: tensors -> the parameters of csrc/cuda, on the device and the current stream of the tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "attention_sm90.h"
#include "cuda/compact_keys.h"
#include "cuda/step_blend.h"
#include "step_blend.h"

namespace {

using lr::MaybeTensor;
using lr::ScalarType;
using lr::Tensor;

// Makes a device current, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

void step_blend(Tensor sample, lr::Tensors predictions, Tensor coefficients, MaybeTensor step, int64_t row,
                MaybeTensor mask, MaybeTensor background, MaybeTensor noise, MaybeTensor history, MaybeTensor keep_rows,
                Tensor out, MaybeTensor model_input, MaybeTensor history_out) {
  lr::Call call("step_blend", sample.get_device_index());
  lr::StepBlendCudaParams p{};
  if (step) p.step = lr::step_counter(call, *step);
  p.blend = lr::step_blend_params(call, sample, predictions, coefficients, mask, background, noise, history, keep_rows,
                                  out, model_input, history_out);
  p.row = row;
  p.steps = coefficients.size(0);
  call.require(step || (row >= 0 && row < p.steps), "step", row, "0 to ", p.steps - 1);
  p.coefficient_step_stride = coefficients.size(1) * (p.blend.predictions + lr::kStepBlendColumns);
  if (p.blend.b == 0 || p.blend.c == 0 || p.blend.plane == 0) return;
  const OnDevice device(sample);
  p.stream = device.stream();
  const char* error = lr::step_blend_cuda(p);
  STD_TORCH_CHECK(!error, "lr_kernels.step_blend: step_blend_kernel: ", error);
}

void compact_keys(MaybeTensor mask, MaybeTensor groups, std::vector<int64_t> classes, Tensor index, Tensor count) {
  lr::Call call("compact_keys", index.get_device_index());
  lr::CompactKeysParams p{};
  call.count(classes.size(), "classes", 0, lr::kMaxClasses);
  p.c = static_cast<int64_t>(classes.size());
  for (int64_t c = 0; c < p.c; ++c) {
    call.require(classes[c] >= 0 && classes[c] <= 255, {"classes", c}, classes[c], "0 to 255");
    p.classes[c] = static_cast<uint8_t>(classes[c]);
  }
  call.require(index.dim() == 3, "index", index.dim(), "3 dimensions: classes, rows, keys");
  p.r = index.size(1);
  p.m = index.size(2);
  call.require(p.m <= lr::kMaxTokens, "index", p.m, "at most ", lr::kMaxTokens, " keys");
  const auto read = [&](const MaybeTensor& x, ScalarType dtype, const char* name, const uint8_t*& data,
                        int64_t& stride) {
    if (!x) return;
    const lr::View view = call.input(*x, name, dtype, {lr::one_or(p.r), p.m}, 1);
    data = view.as<uint8_t>();
    stride = view.stride[0];
  };
  read(mask, ScalarType::Bool, "mask", p.mask, p.mask_stride);
  read(groups, ScalarType::Byte, "groups", p.groups, p.groups_stride);
  p.index = call.output(index, "index", ScalarType::Int, {p.c, p.r, p.m}, 3).as<int32_t>();
  p.count = call.output(count, "count", ScalarType::Int, {p.c, p.r}, 2).as<int32_t>();
  if (p.c == 0 || p.r == 0) return;
  const OnDevice device(index);
  p.stream = device.stream();
  const char* error = lr::compact_keys_cuda(p);
  STD_TORCH_CHECK(!error, "lr_kernels.compact_keys: compact_keys_kernel: ", error);
}

// A card as the machine of bindings/attention_sm90.h.
struct Card {
  explicit Card(const Tensor& x) : like(x), device(x) {}
  static lr::Call call(const char* op, const Tensor& x) { return lr::Call(op, x.get_device_index()); }

  void run(lr::AttentionSm90Params& p) const {
    // A thread that has done nothing on the device has no context yet, and the driver makes no tensor maps without one.
    const cudaError_t bound = cudaSetDevice(like.get_device_index());
    STD_TORCH_CHECK(bound == cudaSuccess, "lr_kernels: cudaSetDevice: ", cudaGetErrorString(bound));
    p.multiprocessors = multiprocessors(like.get_device_index());
    p.stream = device.stream();
    Tensor workspace;  // the allocator keeps the memory for later work of this stream
    if (const int64_t bytes = lr::attention_sm90_workspace(p)) {
      workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
      p.workspace = workspace.data_ptr();
    }
    const char* error = lr::attention_sm90_cuda(p);
    STD_TORCH_CHECK(!error, "lr_kernels.multi_source_attention: attention_sm90: ", error);
  }

 private:
  const Tensor& like;
  const OnDevice device;

  static int32_t multiprocessors(int32_t device) {
    static std::atomic<int32_t> of_device[64];
    std::atomic<int32_t>& known = of_device[device % 64];
    if (known == 0) {
      int count = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
      STD_TORCH_CHECK(error == cudaSuccess, "lr_kernels: cudaDeviceGetAttribute: ", cudaGetErrorString(error));
      known = count;
    }
    return known;
  }
};

}  // namespace

LR_LIBRARY_IMPL(CUDA, m) {
  m.impl("step_blend_cuda", TORCH_BOX(&step_blend));
  m.impl("compact_keys_cuda", TORCH_BOX(&compact_keys));
  m.impl("multi_source_attention_cuda", TORCH_BOX(&lr::AttentionSm90<Card>::op));
  m.impl("multi_source_attention_flat_cuda", TORCH_BOX(&lr::AttentionSm90<Card>::flat_op));
}
