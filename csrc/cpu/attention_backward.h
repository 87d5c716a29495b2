// Gradients of multi_source_attention on the CPU. Scratch: one buffer per thread, at most 1 MiB.
#pragma once
#include "params.h"

namespace lr {

void attention_backward_cpu(const AttentionBackwardParams& params, const Parallel& parallel);

}  // namespace lr
