// lr_kernels::subject_mask_cpu: tensors -> SubjectMaskParams.
#include "cpu/subject_mask.h"

#include "bindings.h"

namespace {

using lr::Tensor;

void subject_mask(Tensor maps, std::optional<double> threshold, std::optional<double> quantile, int64_t smoothing,
                  Tensor out) {
  lr::SubjectMaskParams p{};
  p.maps = static_cast<const float*>(maps.data_ptr());
  p.out = static_cast<uint8_t*>(out.data_ptr());
  p.b = maps.size(0);
  p.l = maps.size(1);
  p.h = maps.size(2);
  p.w = maps.size(3);
  p.out_h = out.size(1);
  p.out_w = out.size(2);
  p.smoothing = smoothing;
  using Level = lr::SubjectMaskParams::Level;
  p.level = quantile ? Level::kQuantile : threshold ? Level::kThreshold : Level::kOtsu;
  p.value = quantile.value_or(threshold.value_or(0.0));
  lr::subject_mask_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) { m.impl("subject_mask_cpu", TORCH_BOX(&subject_mask)); }
