// lr_kernels::merge_attention_states_cpu: tensors -> MergeParams.
#include "cpu/merge.h"

#include "bindings.h"

namespace {

using lr::kAny;
using lr::ScalarType;
using lr::Tensor;
using lr::Tensors;

void merge_attention_states(Tensors outs, Tensors lses, Tensor out, Tensor lse) {
  lr::Call call("merge_attention_states");
  const ScalarType dtype = call.floating(out, "out");
  call.count(outs.size(), "outs", 1, lr::kMaxParts);
  call.count(lses.size(), "lses", outs.size(), outs.size());
  lr::MergeParams p{};
  p.parts = static_cast<int32_t>(outs.size());
  const lr::View first = call.input(outs[0], {"outs", 0}, dtype, {kAny, kAny, kAny, kAny}, 1);
  p.b = first.size[0];
  p.n = first.size[1];
  p.h = first.size[2];
  p.d = first.size[3];
  for (int32_t k = 0; k < p.parts; ++k) {
    const lr::View part = k == 0 ? first : call.input(outs[k], {"outs", k}, dtype, {p.b, p.n, p.h, p.d}, 1);
    const lr::View part_lse = call.input(lses[k], {"lses", k}, ScalarType::Float, {p.b, p.n, p.h}, 0);
    p.part[k] = part.data;
    p.part_lse[k] = part_lse.as<float>();
    lr::copy_strides(part, p.part_stride[k]);
    lr::copy_strides(part_lse, p.part_lse_stride[k]);
  }
  p.out = call.output(out, "out", dtype, {p.b, p.n, p.h, p.d}, 4).data;
  const lr::View result = call.output(lse, "lse", ScalarType::Float, {p.b, p.n, p.h}, 3);
  if (result.reach == 0) return;
  p.lse = result.as<float>();
  p.dtype = lr::dtype_of(dtype);
  lr::merge_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("merge_attention_states_cpu", TORCH_BOX(&merge_attention_states));
}
