// lr_kernels::merge_attention_states_cpu: tensors -> MergeParams.
#include "bindings.h"
#include "cpu/kernels.h"

namespace lr {
namespace {

void merge_attention_states(Tensors outs, Tensors lses, Tensor out, Tensor lse) {
  Call call("merge_attention_states");
  const ScalarType dtype = call.floating(out, "out");
  call.count(outs.size(), "outs", 1, kMaxParts);
  call.count(lses.size(), "lses", outs.size(), outs.size());
  MergeParams p{};
  p.parts = static_cast<int32_t>(outs.size());
  const View first = call.input(outs[0], {"outs", 0}, dtype, {kAny, kAny, kAny, kAny}, 1);
  p.b = first.size[0];
  p.n = first.size[1];
  p.h = first.size[2];
  p.d = first.size[3];
  for (int32_t k = 0; k < p.parts; ++k) {
    const View part = k == 0 ? first : call.input(outs[k], {"outs", k}, dtype, {p.b, p.n, p.h, p.d}, 1);
    const View part_lse = call.input(lses[k], {"lses", k}, ScalarType::Float, {p.b, p.n, p.h}, 0);
    p.part[k] = part.data;
    p.part_lse[k] = part_lse.as<float>();
    copy_strides(part, p.part_stride[k]);
    copy_strides(part_lse, p.part_lse_stride[k]);
  }
  p.out = call.output(out, "out", dtype, {p.b, p.n, p.h, p.d}, 4).data;
  const View result = call.output(lse, "lse", ScalarType::Float, {p.b, p.n, p.h}, 3);
  if (result.reach == 0) return;
  p.lse = result.as<float>();
  p.dtype = dtype_of(dtype);
  merge_cpu(p, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) { m.impl("merge_attention_states_cpu", TORCH_BOX(&merge_attention_states)); }

}  // namespace lr
