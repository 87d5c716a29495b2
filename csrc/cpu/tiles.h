// AMX tiles, where the instruction set has them: products of 16 x 32 by 32 x 16 bf16 in one instruction.
#pragma once
#include "cpu/simd.h"

namespace lr::LR_ISA {
namespace {

#if defined(__AMX_BF16__)

// Eight AMX tiles of 16 rows of 64 bytes. The one object is static: GCC 12 believes that _tile_loadconfig reads only 8
// bytes, and would not write the rest of a local variable.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) constexpr TileConfig kConfig;

// A thread configures its AMX tiles before its first product and releases them after its last.
class TileSession {
 public:
  TileSession() { _tile_loadconfig(&kConfig); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
  ~TileSession() { _tile_release(); }
};

// GCC 12 does not know that a tile load reads memory: this keeps earlier stores before it.
LR_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

#endif

}  // namespace
}  // namespace lr::LR_ISA
