// step_blend on the CPU: one pass over every tensor, fp32 sums. No scratch.
#pragma once
#include "params.h"

namespace lr {

void step_blend_cpu(const StepBlendParams& params, const Parallel& parallel);

}  // namespace lr
