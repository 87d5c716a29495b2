// lr_kernels::step_blend_cpu: tensors -> StepBlendParams.
#include "cpu/step_blend.h"

#include "bindings.h"

namespace {

using lr::Tensor;
using MaybeTensor = std::optional<Tensor>;

void step_blend(Tensor sample, std::vector<Tensor> predictions, Tensor coefficients, Tensor step, MaybeTensor mask,
                MaybeTensor background, MaybeTensor noise, Tensor out) {
  const int64_t steps = coefficients.size(0), at = *static_cast<const int32_t*>(step.data_ptr());
  STD_TORCH_CHECK(at >= 0 && at < steps, "lr_kernels.step_blend: step: expected 0 to ", steps - 1, ", got ", at);
  STD_TORCH_CHECK(predictions.size() <= lr::kMaxPredictions, "lr_kernels.step_blend: more than 6 predictions");
  lr::StepBlendParams p{};
  p.sample = sample.data_ptr();
  p.sample_stride = sample.stride(0);
  p.predictions = static_cast<int32_t>(predictions.size());
  for (int32_t k = 0; k < p.predictions; ++k) {
    p.prediction[k] = predictions[k].data_ptr();
    p.prediction_stride[k] = predictions[k].stride(0);
  }
  p.coefficients = static_cast<const float*>(coefficients.data_ptr()) + at * coefficients.stride(0);
  p.coefficient_stride = lr::shared_stride(coefficients, 1);
  p.mask = lr::pointer_or_null<float>(mask);
  p.background = lr::pointer_or_null<void>(background);
  p.noise = lr::pointer_or_null<void>(noise);
  if (mask) p.mask_stride = lr::shared_stride(*mask, 0);
  if (background) p.background_stride = background->stride(0);
  if (noise) p.noise_stride = noise->stride(0);
  p.out = out.data_ptr();
  p.out_stride = out.stride(0);
  p.b = sample.size(0);
  p.c = sample.size(1);
  p.plane = sample.size(2) * sample.size(3);
  p.dtype = lr::dtype_of(sample);
  lr::step_blend_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) { m.impl("step_blend_cpu", TORCH_BOX(&step_blend)); }
