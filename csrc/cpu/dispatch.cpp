// Chooses the instruction set at run time, and calls its version of a kernel.
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace lr {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

// Whether the processor has bf16 tiles and Linux gives this process their registers: 8 KiB a thread, on request.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa read_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("LR_KERNELS_ISA");
  for (int i = 0; wanted && i < static_cast<int>(best); ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Isa>(i);
  return best;
}

Isa chosen_isa() {
  static const Isa isa = read_isa();
  return isa;
}

}  // namespace

const char* isa() { return kNames[static_cast<int>(chosen_isa())]; }

// The entry of a kernel.
#define LR_DECLARE(isa, name, Params)                 \
  namespace isa {                                     \
  void name##_kernel(const Params&, const Parallel&); \
  }
#if defined(__x86_64__)
#define LR_DEFINE_ENTRY(name, Params, on_amx)                       \
  LR_DECLARE(on_amx, name, Params)                                  \
  LR_DECLARE(avx512bf16, name, Params)                              \
  LR_DECLARE(avx512, name, Params)                                  \
  LR_DECLARE(avx2, name, Params)                                    \
  LR_DECLARE(baseline, name, Params)                                \
  void name##_cpu(const Params& params, const Parallel& parallel) { \
    switch (chosen_isa()) {                                         \
      case Isa::kAmx:                                               \
        return on_amx::name##_kernel(params, parallel);             \
      case Isa::kAvx512Bf16:                                        \
        return avx512bf16::name##_kernel(params, parallel);         \
      case Isa::kAvx512:                                            \
        return avx512::name##_kernel(params, parallel);             \
      case Isa::kAvx2:                                              \
        return avx2::name##_kernel(params, parallel);               \
      case Isa::kBaseline:                                          \
        return baseline::name##_kernel(params, parallel);           \
    }                                                               \
  }
#else
#define LR_DEFINE_ENTRY(name, Params, on_amx) \
  LR_DECLARE(baseline, name, Params)          \
  void name##_cpu(const Params& params, const Parallel& parallel) { baseline::name##_kernel(params, parallel); }
#endif
LR_CPU_KERNELS(LR_DEFINE_ENTRY)

}  // namespace lr
