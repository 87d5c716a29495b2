// The CPU kernels. A new one is a line of this list, a struct in params.h, and a csrc/cpu/<name>_kernel.cpp that
// defines lr::LR_ISA::<name>_kernel(params, parallel) and is compiled once per instruction set.
#pragma once
#include "params.h"

// KERNEL(name, parameters, where a processor with AMX runs it). CMakeLists.txt compiles those named amx for it too.
#define LR_CPU_KERNELS(KERNEL)                                                                                    \
  /* multi_source_attention. Scratch: one buffer per thread, at most 1 MiB. */                                    \
  KERNEL(attention, AttentionParams, amx)                                                                         \
  /* Its gradients. Scratch: one buffer per thread, at most 1 MiB. */                                             \
  KERNEL(attention_backward, AttentionBackwardParams, avx512bf16)                                                 \
  /* merge_attention_states: one pass over every part. No scratch. */                                             \
  KERNEL(merge, MergeParams, avx512bf16)                                                                          \
  /* attention_with_token_maps, exact softmax in fp32. Scratch per thread, in floats: 32 * (m + 2 * d) + 128 * t, \
     and 2 * m * d for 16-bit dtypes. */                                                                          \
  KERNEL(token_maps, TokenMapsParams, avx512bf16)                                                                 \
  /* subject_mask, in double. Scratch per row: 8 * (h * w + 2 * out_h * out_w) bytes. */                          \
  KERNEL(subject_mask, SubjectMaskParams, avx512bf16)                                                             \
  /* adain: one pass for the statistics, in double, and one to write. No scratch beyond the stack. */             \
  KERNEL(adain, AdainParams, avx512bf16)                                                                          \
  /* correspondence, in fp32: blocks of both token sets, with the best of each token so far. Scratch:             \
     8 * m * (b + b or 1) bytes for both rows of the reference or one; per thread 384 KiB of targets (at least    \
     128 * c bytes) and 288 * c bytes. */                                                                         \
  KERNEL(correspondence, CorrespondenceParams, avx512bf16)                                                        \
  /* step_blend: one pass over every tensor, fp32 sums. No scratch. */                                            \
  KERNEL(step_blend, StepBlendParams, avx512bf16)                                                                 \
  /* For benchmarks: multiply-adds that depend on no memory, as many as this processor can do. */                 \
  KERNEL(peak, PeakParams, amx)

namespace lr {

#define LR_DECLARE_ENTRY(name, Params, on_amx) void name##_cpu(const Params& params, const Parallel& parallel);
LR_CPU_KERNELS(LR_DECLARE_ENTRY)
#undef LR_DECLARE_ENTRY

// The instruction set that all of them use: "amx", "avx512bf16", "avx512", "avx2" or "baseline", the best that this
// processor has and this build contains. The environment variable LR_KERNELS_ISA, read once, names a lesser one.
const char* isa();

}  // namespace lr
