// The arithmetic peak of this processor, for benchmarks: what multiply-adds alone reach.
#pragma once
#include "params.h"

namespace lr {

// Runs `rounds` of independent multiply-adds on every thread of `parallel`: fp32, or bf16 pairs summed in fp32 where
// `bf16`. Returns the floating-point operations done, 0 where the instruction set has no products of bf16 pairs.
double peak_cpu(bool bf16, int64_t rounds, const Parallel& parallel);

}  // namespace lr
