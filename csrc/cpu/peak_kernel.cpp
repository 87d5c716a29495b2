// Chains of multiply-adds that depend on nothing but themselves, in registers: no loads, no stores.
#include "cpu/tiles.h"
#include "params.h"

namespace lr::LR_ISA {

namespace {

constexpr int kChains = 12;  // latency times ports is 8 to 12; with two operands they fit 16 registers

// Starts differ, or the compiler would see that all chains are one.
template <class Step>
LR_INLINE void run_chains(int64_t rounds, Step step) {
  Vec sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = set1(float(i));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = step(sum[i]);
  }
  Vec total{};
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) total += sum[i];
  [[maybe_unused]] volatile float used = total[0];
}

void fp32_chains(void* rounds, int64_t) {
  const Vec factor = set1(0.9999f), term = set1(1e-6f);
  run_chains(*static_cast<int64_t*>(rounds), [=](Vec x) { return x * factor + term; });
}

#if defined(__AMX_BF16__)
constexpr double kBf16Operations = 4 * 2.0 * 16 * 16 * 32;  // a round: four products of tiles

void bf16_chains(void* rounds, int64_t) {
  const TileSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t r = 0; r < *static_cast<int64_t*>(rounds); ++r) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
}
#elif LR_HAS_BF16_DOT
constexpr double kBf16Operations = 4.0 * kChains * kLanes;

void bf16_chains(void* rounds, int64_t) {
  const VecPair one = ones();
  run_chains(*static_cast<int64_t*>(rounds), [=](Vec x) { return dot(x, one, one); });
}
#endif

}  // namespace

void peak_kernel(const PeakParams& p, const Parallel& parallel) {
  int64_t rounds = p.rounds;
  const double all_rounds = double(parallel.threads) * double(rounds);
  *p.operations = 0;
  if (!p.bf16) {
    parallel.run(parallel.threads, fp32_chains, &rounds);
    *p.operations = all_rounds * 2.0 * kChains * kLanes;
  } else {
#if LR_HAS_BF16_DOT
    parallel.run(parallel.threads, bf16_chains, &rounds);
    *p.operations = all_rounds * kBf16Operations;
#endif
  }
}

}  // namespace lr::LR_ISA
