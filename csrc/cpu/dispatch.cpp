#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lr {
namespace {

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

}  // namespace

Isa chosen_isa() {
  static const Isa isa = read_isa();
  return isa;
}

const char* isa() { return kNames[static_cast<int>(chosen_isa())]; }

}  // namespace lr
