// adain on the CPU: one pass for the statistics, in double, and one to write. No scratch beyond the stack.
#pragma once
#include "params.h"

namespace lr {

void adain_cpu(const AdainParams& params, const Parallel& parallel);

}  // namespace lr
