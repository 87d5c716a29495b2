#include "cpu/step_blend.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(step_blend_kernel, const lr::StepBlendParams&, const lr::Parallel&)

namespace lr {

void step_blend_cpu(const StepBlendParams& params, const Parallel& parallel) {
  LR_CALL_CHOSEN(step_blend_kernel, params, parallel);
}

}  // namespace lr
