// lr_kernels::*_cuda: tensors -> the parameters of csrc/cuda, on the device and the current stream of the tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

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

void step_blend(Tensor sample, std::vector<Tensor> predictions, Tensor coefficients, MaybeTensor step, int64_t row,
                MaybeTensor mask, MaybeTensor background, MaybeTensor noise, MaybeTensor history, MaybeTensor keep_rows,
                Tensor out, MaybeTensor model_input, MaybeTensor history_out) {
  lr::StepBlendCudaParams p{};
  p.blend = lr::step_blend_params(sample, predictions, coefficients, mask, background, noise, history, keep_rows, out,
                                  model_input, history_out);
  if (step) {
    lr::require(step->scalar_type() == ScalarType::Int && step->numel() == 1 && step->is_cuda(), "step",
                "one int32 on the device of sample");
    p.step = static_cast<const int32_t*>(step->data_ptr());
  }
  p.row = row;
  p.steps = coefficients.size(0);
  STD_TORCH_CHECK(step || (row >= 0 && row < p.steps), "lr_kernels.step_blend: step: expected 0 to ", p.steps - 1,
                  ", got ", row);
  p.coefficient_step_stride = coefficients.stride(0);
  const OnDevice device(sample);
  p.stream = device.stream();
  const char* error = lr::step_blend_cuda(p);
  STD_TORCH_CHECK(!error, "lr_kernels.step_blend: step_blend_kernel: ", error);
}

void compact_keys(MaybeTensor mask, MaybeTensor groups, std::vector<int64_t> classes, Tensor index, Tensor count) {
  const auto require = [](bool fits, const char* name, const char* expected) {
    STD_TORCH_CHECK(fits, "lr_kernels.compact_keys: ", name, ": expected ", expected);
  };
  lr::CompactKeysParams p{};
  require(index.dim() == 3 && index.is_contiguous() && index.scalar_type() == ScalarType::Int, "index",
          "a contiguous int32 (classes, rows, keys)");
  p.c = index.size(0);
  p.r = index.size(1);
  p.m = index.size(2);
  require(static_cast<int64_t>(classes.size()) == p.c && p.c <= lr::kMaxClasses, "classes", "one byte per list");
  require(count.dim() == 2 && count.is_contiguous() && count.scalar_type() == ScalarType::Int && count.size(0) == p.c &&
              count.size(1) == p.r,
          "count", "a contiguous int32 (classes, rows)");
  const auto read = [&](const MaybeTensor& x, ScalarType dtype, const char* name, const uint8_t*& data,
                        int64_t& stride) {
    if (!x) return;
    require(x->dim() == 2 && x->scalar_type() == dtype && (x->size(0) == 1 || x->size(0) == p.r) && x->size(1) == p.m &&
                (x->stride(1) == 1 || p.m <= 1),
            name, "(rows or 1, keys), the keys contiguous");
    data = static_cast<const uint8_t*>(x->data_ptr());
    stride = lr::shared_stride(*x, 0);
  };
  read(mask, ScalarType::Bool, "mask", p.mask, p.mask_stride);
  read(groups, ScalarType::Byte, "groups", p.groups, p.groups_stride);
  for (int64_t c = 0; c < p.c; ++c) p.classes[c] = static_cast<uint8_t>(classes[c]);
  p.index = static_cast<int32_t*>(index.data_ptr());
  p.count = static_cast<int32_t*>(count.data_ptr());
  const OnDevice device(index);
  p.stream = device.stream();
  const char* error = lr::compact_keys_cuda(p);
  STD_TORCH_CHECK(!error, "lr_kernels.compact_keys: compact_keys_kernel: ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CUDA, m) {
  m.impl("step_blend_cuda", TORCH_BOX(&step_blend));
  m.impl("compact_keys_cuda", TORCH_BOX(&compact_keys));
}
