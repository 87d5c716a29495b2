// How attention for Hopper is cut into tiles, and where the tiles lie in shared memory.
#pragma once
#include "cuda/sm90/device.h"
#include "params.h"

namespace lr::sm90 {

// An operand of wgmma in shared memory. swizzle: 32, 64 or 128 bytes; offsets in bytes. What leading and stride mean
// depends on the operand's layout: see the PTX ISA, "Matrix descriptor".
LR_DEVICE uint64_t descriptor(uint32_t at, uint32_t leading, uint32_t stride, int swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return (at >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | mode << 62;
}

// A tile of Rows tokens of D channels: columns of Swizzle bytes of channels, one after the other. In a column a row
// follows the other, and the units of 16 bytes of eight rows are exchanged so that neither copies nor products meet in
// a bank. TMA writes this layout by itself.
template <int D, int Rows, int Swizzle>
struct Tile {
  static_assert(Swizzle == 32 || Swizzle == 64 || Swizzle == 128);
  static constexpr int Width = Swizzle / 16;       // units of a row of a column
  static constexpr int Column = Rows * Swizzle;    // bytes
  static constexpr int EightRows = 8 * Swizzle;    // bytes
  static constexpr int Units = (D + 15) / 16 * 2;  // of a row, with those that fill up a step of 16 channels
  static constexpr int Columns = (Units + Width - 1) / Width;
  static constexpr int Bytes = Columns * Column;

  LR_DEVICE static constexpr uint32_t place(int row, int unit) {
    return unit / Width * Column + row * Swizzle + ((unit ^ row * Width / 8) & (Width - 1)) * 16;
  }
  // As an operand of which each row is a row (or column) of the product: keys, queries. step(k): how far channels 16 k
  // to 16 k + 16 are, in units of 16 bytes.
  LR_DEVICE static uint64_t by_channels(uint32_t tile) { return descriptor(tile, 16, EightRows, Swizzle); }
  LR_DEVICE static constexpr int channel_step(int k) { return (2 * k / Width * Column + 2 * k % Width * 16) / 16; }
  // As an operand whose sum runs over the rows: values. How far rows 16 k to 16 k + 16 are.
  LR_DEVICE static uint64_t by_rows(uint32_t tile) { return descriptor(tile, Column, EightRows, Swizzle); }
  LR_DEVICE static constexpr int row_step(int k) { return 2 * k * EightRows / 16; }
};

// Whether a call has what needs a number per key or more than a softmax: key_bias, logit_scale, logit_bias, a scale
// that is not positive, value_index, several softmax groups. It costs the plain calls nothing.
enum class Kind { kPlain, kGeneral };

constexpr int kConsumers = 2;              // warpgroups of a block that multiply
constexpr int kQueries = 64 * kConsumers;  // of a work item

// D: the channels that products are made for; the call's head_dim is D or less. BN: keys of a tile. Two warpgroups
// consume: 64 queries each; one produces: it fills Stages places for a tile of keys and one of values.
template <int D_, int BN_, int Stages_, int Swizzle_, bool Half_, Kind Kind_>
struct Config {
  static constexpr int D = D_, BN = BN_, Stages = Stages_, Swizzle = Swizzle_;
  static constexpr bool Half = Half_, General = Kind_ == Kind::kGeneral;
  using Keys = Tile<D, BN, Swizzle>;
  using Queries = Tile<D, 64, Swizzle>;

  static constexpr int Consumers = kConsumers, BM = kQueries, Threads = 128 * (Consumers + 1);
  static constexpr int Chunks = D / 8, Steps = (D + 15) / 16;  // 16 bytes of a row; products for a score
  // Queries are operands in registers, which spares shared memory and a fifth of its traffic at D 64, up to where the
  // registers end.
  static constexpr bool SharedQueries = D > 160;

  // 65,536 registers of a multiprocessor: at launch the same for all threads, then most go to the consumers.
  static constexpr int LaunchRegisters = 65536 / Threads / 8 * 8;
  static constexpr int ProducerRegisters = 56, ConsumerRegisters = 224;
  static_assert(Consumers * ConsumerRegisters + ProducerRegisters <= (Consumers + 1) * LaunchRegisters);

  // Shared memory: barriers, then what the general kind adds to the logits of each tile, then tiles at multiples of
  // 1,024 bytes, as their swizzle wants.
  static constexpr int BarrierBytes = 4 * 8 * Stages, ShiftBytes = General ? 4 * BN * Stages : 0;
  static constexpr int TileBytes = 2 * Stages * Keys::Bytes + (SharedQueries ? Consumers * Queries::Bytes : 0);
  static constexpr int SharedBytes = BarrierBytes + ShiftBytes + 1024 + TileBytes;
  static_assert(D % 8 == 0 && BN % 16 == 0 && BN <= 128);
  static_assert(SharedBytes <= 232448 - 1024);
};

// What was found to compile without spills, in the largest tiles; see docs/hopper.md.
template <int D, bool Half, Kind K>
struct ConfigOf;
template <bool Half, Kind K>
struct ConfigOf<40, Half, K> : Config<40, 128, 4, 128, Half, K> {};
template <bool Half, Kind K>
struct ConfigOf<64, Half, K> : Config<64, 128, 4, 128, Half, K> {};
template <bool Half, Kind K>
struct ConfigOf<80, Half, K> : Config<80, 128, 4, 32, Half, K> {};
template <bool Half>
struct ConfigOf<128, Half, Kind::kPlain> : Config<128, 128, 3, 128, Half, Kind::kPlain> {};
template <bool Half>
struct ConfigOf<128, Half, Kind::kGeneral> : Config<128, 96, 3, 128, Half, Kind::kGeneral> {};
template <bool Half>
struct ConfigOf<160, Half, Kind::kPlain> : Config<160, 96, 3, 64, Half, Kind::kPlain> {};
template <bool Half>
struct ConfigOf<160, Half, Kind::kGeneral> : Config<160, 80, 3, 64, Half, Kind::kGeneral> {};
template <bool Half>
struct ConfigOf<256, Half, Kind::kPlain> : Config<256, 64, 2, 128, Half, Kind::kPlain> {};
template <bool Half>
struct ConfigOf<256, Half, Kind::kGeneral> : Config<256, 32, 4, 128, Half, Kind::kGeneral> {};

// The addresses of all that lies in shared memory.
template <class C>
struct Shared {
  uint32_t base, shifts, tiles;
  LR_DEVICE Shared() : base(shared_base()), shifts(base + C::BarrierBytes) {
    tiles = (shifts + C::ShiftBytes + 1023) & ~1023u;
  }
  // mbarriers of a stage: full once its copies have landed, empty once its products are done
  LR_DEVICE uint32_t full_key(int stage) const { return base + 8 * stage; }
  LR_DEVICE uint32_t full_value(int stage) const { return base + 8 * (C::Stages + stage); }
  LR_DEVICE uint32_t empty_key(int stage) const { return base + 8 * (2 * C::Stages + stage); }
  LR_DEVICE uint32_t empty_value(int stage) const { return base + 8 * (3 * C::Stages + stage); }

  LR_DEVICE uint32_t shift(int stage, int key) const { return shifts + 4 * (stage * C::BN + key); }
  LR_DEVICE uint32_t key(int stage) const { return tiles + stage * C::Keys::Bytes; }
  LR_DEVICE uint32_t value(int stage) const { return tiles + (C::Stages + stage) * C::Keys::Bytes; }
  LR_DEVICE uint32_t query(int consumer) const {
    return tiles + 2 * C::Stages * C::Keys::Bytes + consumer * C::Queries::Bytes;
  }
};

// Boxes of BN tokens of one row and head, as (d, h, m, r), with as many channels as a column of a tile holds.
struct Maps {
  TensorMap key[kMaxSources], value[kMaxSources];
  uint32_t keys = 0, values = 0;  // bit s: source s has one
};

// A place in the ring of stages; round counts how often it went around.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t round = 0;
  LR_DEVICE void next() {
    if (++stage == Stages) stage = 0, ++round;
  }
};

}  // namespace lr::sm90
