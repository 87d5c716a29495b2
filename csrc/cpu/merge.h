// merge_attention_states on the CPU: one pass over every part. No scratch.
#pragma once
#include "params.h"

namespace lr {

void merge_cpu(const MergeParams& params, const Parallel& parallel);

}  // namespace lr
