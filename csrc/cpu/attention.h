// multi_source_attention on the CPU. Scratch: one buffer per thread, at most 1 MiB.
#pragma once
#include "params.h"

namespace lr {

void attention_cpu(const AttentionParams& params, const Parallel& parallel);

}  // namespace lr
