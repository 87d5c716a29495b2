// The entries of the CPU kernels that params.h lists: each runs the kernel for the best instruction set. A new kernel
// is a struct and a line there, and a csrc/cpu/<name>_kernel.cpp that defines lr::LR_ISA::<name>_kernel(params,
// parallel) and is compiled once per instruction set.
#pragma once
#include "params.h"

namespace lr {

#define LR_DECLARE_ENTRY(name, Params, on_amx) void name##_cpu(const Params& params, const Parallel& parallel);
LR_CPU_KERNELS(LR_DECLARE_ENTRY)
#undef LR_DECLARE_ENTRY

// The instruction set that all of them use: "amx", "avx512bf16", "avx512", "avx2" or "baseline", the best that this
// processor has and this build contains. The environment variable LR_KERNELS_ISA, read once, names a lesser one.
const char* isa();

}  // namespace lr
