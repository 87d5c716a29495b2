// lr_kernels::correspondence_cpu: tensors -> CorrespondenceParams.
#include "cpu/correspondence.h"

#include "bindings.h"

namespace {

using lr::Tensor;

void correspondence(Tensor target, Tensor reference, int64_t columns, int64_t radius_squared, Tensor index,
                    Tensor consistent) {
  STD_TORCH_CHECK(reference.size(1) > 0 && columns > 0,
                  "lr_kernels.correspondence: expected at least one reference token and column");
  lr::CorrespondenceParams p{};
  p.target = target.data_ptr();
  p.reference = reference.data_ptr();
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.consistent = static_cast<uint8_t*>(consistent.data_ptr());
  p.b = target.size(0);
  p.n = target.size(1);
  p.m = reference.size(1);
  p.c = target.size(2);
  for (int i = 0; i < 2; ++i) {
    p.target_stride[i] = target.stride(i);
    p.reference_stride[i] = lr::shared_stride(reference, i);
  }
  p.columns = columns;
  p.radius_squared = radius_squared;
  p.dtype = lr::dtype_of(target);
  lr::correspondence_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) { m.impl("correspondence_cpu", TORCH_BOX(&correspondence)); }
