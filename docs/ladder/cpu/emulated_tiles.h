// The four AMX instructions of step 5 as plain loops, for processors without them: what they compute, not how fast.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace lr::LR_ISA {

struct TileSession {
  TileSession() {}  // there are no registers to set up
};

LR_INLINE void memory_barrier() {}

inline thread_local uint32_t tile_register[8][16][16];  // eight tiles of 16 rows of 64 bytes

inline void emulated_zero(int tile) { std::memset(tile_register[tile], 0, sizeof(tile_register[tile])); }

inline void emulated_load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(tile_register[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tile_register[tile][row], 64);
}

// sums[i][j] += Σ_k of both halves: a[i][k] · b[k][j]. A row of a and a column of b hold 16 pairs each.
inline void emulated_product(int sums, int a, int b) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = tile_register[a][i][k];
      const float low = to_float(BFloat16{uint16_t(x)}), high = to_float(BFloat16{uint16_t(x >> 16)});
      for (int j = 0; j < 16; ++j) {
        const uint32_t y = tile_register[b][k][j];
        float sum;
        std::memcpy(&sum, &tile_register[sums][i][j], 4);
        sum += low * to_float(BFloat16{uint16_t(y)}) + high * to_float(BFloat16{uint16_t(y >> 16)});
        std::memcpy(&tile_register[sums][i][j], &sum, 4);
      }
    }
}

}  // namespace lr::LR_ISA

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_product
