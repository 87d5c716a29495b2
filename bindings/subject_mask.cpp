// lr_kernels::subject_mask_cpu: tensors -> SubjectMaskParams.
#include <algorithm>

#include "bindings.h"
#include "cpu/kernels.h"

namespace lr {
namespace {

void subject_mask(Tensor maps, std::optional<double> threshold, std::optional<double> quantile, int64_t smoothing,
                  Tensor out) {
  Call call("subject_mask");
  const View images = call.input(maps, "maps", ScalarType::Float, {kAny, kAny, kAny, kAny}, 4);
  SubjectMaskParams p{};
  p.b = images.size[0];
  p.l = images.size[1];
  p.h = images.size[2];
  p.w = images.size[3];
  call.require(p.l > 0 && p.h > 0 && p.w > 0, "maps", "none", "at least one map of at least one pixel");
  const View mask = call.output(out, "out", ScalarType::Bool, {p.b, kAny, kAny}, 3);
  p.out_h = mask.size[1];
  p.out_w = mask.size[2];
  call.require(p.out_h > 0 && p.out_w > 0, "out", "none", "at least one pixel");
  const auto in_unit_interval = [&](const std::optional<double>& x, const char* name) {
    if (x) call.require(*x >= 0 && *x <= 1, name, *x, "0 to 1");
  };
  in_unit_interval(threshold, "threshold");
  in_unit_interval(quantile, "quantile");
  call.require(!threshold || !quantile, "quantile", "both", "None beside a threshold");
  const int64_t longer = std::max(p.out_h, p.out_w);
  call.require(smoothing % 2 == 1 && smoothing >= 1 && smoothing <= longer, "smoothing", smoothing,
               "an odd number from 1 to ", longer);
  if (p.b == 0) return;
  p.maps = images.as<float>();
  p.out = mask.as<uint8_t>();
  p.smoothing = smoothing;
  using Level = SubjectMaskParams::Level;
  p.level = quantile ? Level::kQuantile : threshold ? Level::kThreshold : Level::kOtsu;
  p.value = quantile.value_or(threshold.value_or(0.0));
  subject_mask_cpu(p, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) { m.impl("subject_mask_cpu", TORCH_BOX(&subject_mask)); }

}  // namespace lr
