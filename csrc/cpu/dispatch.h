// Chooses the instruction set at run time. Each kernel is one source compiled once per instruction set.
#pragma once

namespace lr {

// "amx", "avx512bf16", "avx512", "avx2" or "baseline": the best that this processor has and this build contains. The
// environment variable LR_KERNELS_ISA, read once, names a lesser one.
const char* isa();

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
Isa chosen_isa();

}  // namespace lr

// Declares `void function(params)` for every instruction set of this build, and calls the chosen one. Only attention
// has a version for AMX; the others take the next best.
#if defined(__x86_64__)
#define LR_DECLARE_PER_ISA(function, ...) \
  namespace lr::avx512bf16 {              \
  void function(__VA_ARGS__);             \
  }                                       \
  namespace lr::avx512 {                  \
  void function(__VA_ARGS__);             \
  }                                       \
  namespace lr::avx2 {                    \
  void function(__VA_ARGS__);             \
  }                                       \
  namespace lr::baseline {                \
  void function(__VA_ARGS__);             \
  }
#define LR_CALL_CHOSEN(function, ...)           \
  switch (chosen_isa()) {                       \
    case Isa::kAmx:                             \
    case Isa::kAvx512Bf16:                      \
      return avx512bf16::function(__VA_ARGS__); \
    case Isa::kAvx512:                          \
      return avx512::function(__VA_ARGS__);     \
    case Isa::kAvx2:                            \
      return avx2::function(__VA_ARGS__);       \
    case Isa::kBaseline:                        \
      return baseline::function(__VA_ARGS__);   \
  }
#else
#define LR_DECLARE_PER_ISA(function, ...) \
  namespace lr::baseline {                \
  void function(__VA_ARGS__);             \
  }
#define LR_CALL_CHOSEN(function, ...) return baseline::function(__VA_ARGS__)
#endif
