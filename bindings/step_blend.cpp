// lr_kernels::step_blend_cpu: tensors -> StepBlendParams.
#include "cpu/step_blend.h"

#include "step_blend.h"

namespace {

using lr::MaybeTensor;
using lr::Tensor;

void step_blend(Tensor sample, std::vector<Tensor> predictions, Tensor coefficients, MaybeTensor step, int64_t row,
                MaybeTensor mask, MaybeTensor background, MaybeTensor noise, MaybeTensor history, MaybeTensor keep_rows,
                Tensor out, MaybeTensor model_input, MaybeTensor history_out) {
  lr::StepBlendParams p = lr::step_blend_params(sample, predictions, coefficients, mask, background, noise, history,
                                                keep_rows, out, model_input, history_out);
  const int64_t steps = coefficients.size(0), at = step ? *static_cast<const int32_t*>(step->data_ptr()) : row;
  STD_TORCH_CHECK(at >= 0 && at < steps, "lr_kernels.step_blend: step: expected 0 to ", steps - 1, ", got ", at);
  p.coefficients += at * coefficients.stride(0);
  for (int64_t r = 0; r < coefficients.size(1); ++r) {  // a term is never dropped silently
    const float* column = p.coefficients + r * p.coefficient_stride + p.predictions;
    STD_TORCH_CHECK(noise || (column[2] == 0 && (!background || column[5] == 0)),
                    "lr_kernels.step_blend: noise: expected a tensor, since sigma or q of step ", at,
                    " is not 0, got None");
    STD_TORCH_CHECK(history || column[3] == 0, "lr_kernels.step_blend: history: expected a tensor, since h of step ",
                    at, " is not 0, got None");
  }
  lr::step_blend_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) { m.impl("step_blend_cpu", TORCH_BOX(&step_blend)); }
