// lr_kernels::merge_attention_states_cpu: tensors -> MergeParams.
#include "cpu/merge.h"

#include "bindings.h"

namespace {

using lr::Tensor;

void merge_attention_states(std::vector<Tensor> outs, std::vector<Tensor> lses, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(!outs.empty() && outs.size() <= lr::kMaxParts && outs.size() == lses.size(),
                  "lr_kernels.merge_attention_states: expected 1 to 16 outs and as many lses");
  lr::MergeParams p{};
  p.parts = static_cast<int32_t>(outs.size());
  for (int32_t k = 0; k < p.parts; ++k) {
    p.part[k] = outs[k].data_ptr();
    p.part_lse[k] = static_cast<const float*>(lses[k].data_ptr());
    lr::strides3(outs[k], p.part_stride[k]);
    lr::strides3(lses[k], p.part_lse_stride[k]);
  }
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.b = out.size(0);
  p.n = out.size(1);
  p.h = out.size(2);
  p.d = out.size(3);
  p.dtype = lr::dtype_of(out);
  lr::merge_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("merge_attention_states_cpu", TORCH_BOX(&merge_attention_states));
}
