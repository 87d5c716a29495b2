// lr_kernels::step_blend_cpu: tensors -> StepBlendParams.
#include "step_blend.h"

#include "cpu/kernels.h"

namespace lr {
namespace {

void step_blend(Tensor sample, Tensors predictions, Tensor coefficients, MaybeTensor step, int64_t row,
                MaybeTensor mask, MaybeTensor background, MaybeTensor noise, MaybeTensor history, MaybeTensor keep_rows,
                Tensor out, MaybeTensor model_input, MaybeTensor history_out) {
  Call call("step_blend");
  const int64_t at = step ? *step_counter(call, *step) : row;
  StepBlendParams p = step_blend_params(call, sample, predictions, coefficients, mask, background, noise, history,
                                        keep_rows, out, model_input, history_out);
  const int64_t steps = coefficients.size(0), rows = coefficients.size(1);
  call.require(at >= 0 && at < steps, "step", at, "0 to ", steps - 1);
  if (rows > 0) p.coefficients += at * rows * (p.predictions + kStepBlendColumns);
  for (int64_t r = 0; r < rows; ++r) {  // a term is never dropped silently
    const float* column = p.coefficients + r * p.coefficient_stride + p.predictions;
    call.require(noise || (column[2] == 0 && (!background || column[5] == 0)), "noise", "None",
                 "a tensor, since sigma or q of step ", at, " is not 0");
    call.require(history || column[3] == 0, "history", "None", "a tensor, since h of step ", at, " is not 0");
  }
  if (p.b == 0 || p.c == 0 || p.plane == 0) return;
  step_blend_cpu(p, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) { m.impl("step_blend_cpu", TORCH_BOX(&step_blend)); }

}  // namespace lr
