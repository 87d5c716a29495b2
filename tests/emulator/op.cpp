// The ops of attention on Hopper for CPU tensors, on the emulator. Everything between an op and the launch is that of
// the CUDA build: bindings/attention_sm90.h, csrc/cuda/attention_sm90.cu, the kernels.
#include "attention_sm90.h"
#include "cuda/attention_sm90.cu"
#include "emulator/memory.h"

namespace lr {
namespace {

int32_t g_multiprocessors = 132, g_parts = 0;

// Declares to the emulator what the kernel may touch: from the first to the last element of each tensor.
struct Extents {
  const AttentionParams& p;

  template <size_t N>
  static void add(const void* data, int64_t bytes, const int64_t (&size)[N], const int64_t (&stride)[N],
                  bool writable = false) {
    int64_t reach = 1;
    for (size_t i = 0; i < N; ++i) {
      if (size[i] == 0) return;
      reach += (size[i] - 1) * stride[i];
    }
    if (data) emulator::g_buffers.add(data, reach * bytes, writable);
  }
  void add_tokens(const void* data, int64_t rows, int64_t tokens, int64_t heads, const int64_t (&stride)[3],
                  bool writable = false, Storage storage = Storage::kElements) const {
    add(data, storage == Storage::kElements ? 2 : 1, {rows, tokens, heads, p.d}, {stride[0], stride[1], stride[2], 1},
        writable);
  }
  void add_source(const AttentionSource& s) const {
    add_tokens(s.key, s.r, s.m, s.k, s.key_stride, false, s.storage);
    add_tokens(s.value, s.r, s.v, s.k, s.value_stride, false, s.storage);
    add(s.key_scale, 4, {s.r, s.m, s.k}, s.key_scale_stride);
    add(s.value_scale, 4, {s.r, s.v, s.k}, s.value_scale_stride);
    add(s.rows, 4, {p.b}, {1});
    add(s.key_index, 4, {p.c, s.r, s.m}, {s.index_stride[0], s.index_stride[1], 1});
    add(s.key_count, 4, {p.c, s.r}, {s.count_stride[0], s.count_stride[1]});
    add(s.value_index, 4, {s.r, p.b, s.m}, {s.value_index_stride[0], s.value_index_stride[1], 1});
    add(s.key_bias, 4, {s.r, s.m}, {s.bias_stride, 1});
    add(s.logit_scale, 4, {p.b, p.h}, s.logit_scale_stride);
    add(s.logit_bias, 4, {p.b, p.h}, s.logit_bias_stride);
  }
  void add_all() const {
    emulator::g_buffers.clear();
    add_tokens(p.query, p.b, p.n, p.h, p.query_stride);
    add_tokens(p.out, p.b, p.n, p.h, p.out_stride, true);
    add(p.lse, p.lse_is_double ? 8 : 4, {p.b, p.n, p.h}, p.lse_stride, true);
    add(p.query_order, 4, {p.b, p.n}, {p.order_stride, 1});
    add(p.class_start, 4, {p.b, p.c + 1}, {p.class_stride, 1});
    for (int32_t i = 0; i < p.sources; ++i) add_source(p.source[i]);
    for (int32_t g = 0; g < p.softmax_groups; ++g) add(p.weight[g], 4, {p.b, p.n}, p.weight_stride[g]);
  }
};

struct Emulator {
  explicit Emulator(const Tensor& x) : like(x) {}
  static Call call(const char* op, const Tensor&) { return Call(op); }
  void run(AttentionSm90Params& p) const {
    p.multiprocessors = g_multiprocessors;
    p.parts = g_parts;
    if (emulator::g_options.launches) Extents{p.attention}.add_all();
    Tensor workspace;
    if (const int64_t bytes = attention_sm90_workspace(p)) {
      workspace = torch::stable::new_empty(like, {bytes / 8}, ScalarType::Double);
      p.workspace = workspace.data_ptr();
      if (emulator::g_options.launches) {
        torch::stable::fill_(workspace, std::numeric_limits<double>::quiet_NaN());
        emulator::g_buffers.add(p.workspace, bytes, true);
      }
    }
    const char* error = attention_sm90_cuda(p);
    STD_TORCH_CHECK(!error, "lr_kernels.multi_source_attention: attention_sm90: ", error);
  }

 private:
  const Tensor& like;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("multi_source_attention_cuda", TORCH_BOX(&AttentionSm90<Emulator>::op));
  m.impl("multi_source_attention_flat_cuda", TORCH_BOX(&AttentionSm90<Emulator>::flat_op));
}

}  // namespace lr

// timing: 0 late, 1 early, 2 random; seed 0: warps in order; parts 0: as the kernel's model of the cost says; launches
// 0: kernels do not run, which shows what a call costs the host beside them.
extern "C" __attribute__((visibility("default"))) void lr_emulator_options(int timing, uint64_t seed,
                                                                           int multiprocessors, int parts,
                                                                           int launches) {
  lr::emulator::g_options = {static_cast<lr::emulator::Timing>(timing), seed, launches != 0};
  lr::g_multiprocessors = multiprocessors;
  lr::g_parts = parts;
}
