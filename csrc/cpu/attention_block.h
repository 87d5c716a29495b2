// Computes one block of keys against one slice of queries: scores, softmax weights, weighted values. The kernels of
// attention, of its gradients and of correspondence include this file, so it is compiled once per instruction set.
#pragma once
#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "cpu/simd.h"

namespace lr::LR_ISA {
namespace {

constexpr int kSlice = 2 * kLanes;  // queries in a slice
// How many keys score_tile and how many channels value_tile take at once: a key tile and a channel tile. Their sums
// should fit the vector registers: 32 with AVX-512 and NEON, 16 with AVX2.
#if defined(__AVX512F__)
constexpr int kKeyTile = 8, kChannelTile = 10;
#elif defined(__AVX2__)
constexpr int kKeyTile = 6, kChannelTile = 6;
#else
constexpr int kKeyTile = 8, kChannelTile = 8;
#endif

// How the products are computed: in fp32, with bf16 pairs along the summed dimension, or with AMX tiles of such pairs
// (attention_tiles.h). A `Unit` is what one lane multiplies. The counts of units, keys and channels are padded with
// zeros to multiples of kUnits, kKeys and kChannels; a block has kBlock keys.
struct Fp32 {
  using Unit = float;
  static constexpr int kPack = 1, kUnits = 1, kKeys = kKeyTile, kChannels = 1, kBlock = 96;
};
struct Bf16Pairs {
  using Unit = uint32_t;
  static constexpr int kPack = 2, kUnits = 1, kKeys = kKeyTile, kChannels = 1, kBlock = 192;
};
struct Bf16Tiles {
  using Unit = uint32_t;
  static constexpr int kPack = 2, kUnits = 16, kKeys = 32, kChannels = 16, kBlock = 256;
};

// ---- products of one tile ----

constexpr int kChain = 32;  // channels summed in one chain

// scores[i] += <key i, query lane> over some units, for kKeyTile keys. queries: units x kSlice.
template <class C>
LR_INLINE void add_scores(const char* keys, int64_t key_bytes, const typename C::Unit* queries, int units,
                          Vec (&scores)[kKeyTile][2]) {
#pragma GCC unroll 4
  for (int u = 0; u < units; ++u) {
    if constexpr (std::is_same_v<C, Fp32>) {
      const Vec q0 = load(queries + u * kSlice), q1 = load(queries + u * kSlice + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeyTile; ++i) {
        const Vec k = set1(reinterpret_cast<const float*>(keys + i * key_bytes)[u]);
        scores[i][0] += k * q0;
        scores[i][1] += k * q1;
      }
    } else {
#if LR_HAS_BF16_DOT
      const VecPair q0 = load_pairs(queries + u * kSlice), q1 = load_pairs(queries + u * kSlice + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeyTile; ++i) {
        const VecPair k = set1_pair(keys + i * key_bytes + u * 4);
        scores[i][0] = dot(scores[i][0], k, q0);
        scores[i][1] = dot(scores[i][1], k, q1);
      }
#endif
    }
  }
}

// scores[i] = <key i, query lane> for kKeyTile keys. In fp32 a sum over many units is made of sums of kChain units, so
// its rounding error grows more slowly with its length than that of one chain.
template <class C>
LR_INLINE void score_tile(const char* keys, int64_t key_bytes, const typename C::Unit* queries, int units,
                          Vec (&scores)[kKeyTile][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeyTile; ++i) scores[i][0] = scores[i][1] = Vec{};
  add_scores<C>(keys, key_bytes, queries, std::is_same_v<C, Fp32> ? std::min(units, kChain) : units, scores);
  if constexpr (std::is_same_v<C, Fp32>) {
    for (int u = kChain; u < units; u += kChain) {
      Vec part[kKeyTile][2]{};
      add_scores<C>(keys + u * 4, key_bytes, queries + u * kSlice, std::min(units - u, kChain), part);
#pragma GCC unroll 16
      for (int i = 0; i < kKeyTile; ++i) {
        scores[i][0] += part[i][0];
        scores[i][1] += part[i][1];
      }
    }
  }
}

// out[c] += Σ_keys value[key][c] · p[key] for kCount channels. Each block's sum starts at zero: 5 times less fp32
// error.
template <class C, int kCount>
LR_INLINE void value_tile(const typename C::Unit* values, int64_t value_stride, const typename C::Unit* p, int units,
                          float* out) {
  Vec sum[kCount][2];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) sum[i][0] = sum[i][1] = Vec{};
#pragma GCC unroll 2
  for (int u = 0; u < units; ++u) {
    if constexpr (std::is_same_v<C, Fp32>) {
      const Vec p0 = load(p + u * kSlice), p1 = load(p + u * kSlice + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const Vec v = set1(values[i]);
        sum[i][0] += v * p0;
        sum[i][1] += v * p1;
      }
    } else {
#if LR_HAS_BF16_DOT
      const VecPair p0 = load_pairs(p + u * kSlice), p1 = load_pairs(p + u * kSlice + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const VecPair v = set1_pair(values + i);
        sum[i][0] = dot(sum[i][0], v, p0);
        sum[i][1] = dot(sum[i][1], v, p1);
      }
#endif
    }
    values += value_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    store(out + i * kSlice, load(out + i * kSlice) + sum[i][0]);
    store(out + i * kSlice + kLanes, load(out + i * kSlice + kLanes) + sum[i][1]);
  }
}

// value_tile for a remainder of 1 .. kCount channels.
template <class C, int kCount>
LR_INLINE void value_remainder(int count, const typename C::Unit* values, int64_t value_stride,
                               const typename C::Unit* p, int units, float* out) {
  if constexpr (kCount > 0) {
    if (count == kCount) return value_tile<C, kCount>(values, value_stride, p, units, out);
    value_remainder<C, kCount - 1>(count, values, value_stride, p, units, out);
  }
}

template <class C, int kTile>
void add_value_tiles(const typename C::Unit* values, const typename C::Unit* p, int units, int d, float* out) {
  int c = 0;
  for (; c + kTile <= d; c += kTile) value_tile<C, kTile>(values + c, d, p, units, out + c * kSlice);
  value_remainder<C, kTile - 1>(d - c, values + c, d, p, units, out + c * kSlice);
}

// out[c] += Σ_keys value[key][c] · p[key] for all d channels of values: units x d.
template <class C>
LR_INLINE void add_values(const typename C::Unit* values, const typename C::Unit* p, int units, int d, float* out) {
  // A channel tile that divides d leaves no remainder; 8 does for most head dims where kChannelTile does not.
  if (kChannelTile > 8 && d % kChannelTile != 0 && d % 8 == 0)
    add_value_tiles<C, 8>(values, p, units, d, out);
  else
    add_value_tiles<C, kChannelTile>(values, p, units, d, out);
}

// ---- one block of keys for one slice of queries ----

// The keys [first, last) of a block that the query in each lane sees: [kSlice] each; null: all of them.
struct LaneRange {
  const float *first = nullptr, *last = nullptr;
  int all_from = 0, all_to = 0;  // the keys that the queries in all lanes see

  explicit operator bool() const { return first != nullptr; }
  // Whether some lane does not see all of the keys [i, i + count).
  bool cuts(int i, int count) const { return first && (i < all_from || i + count > all_to); }
  // x in the lanes of half `half` that see key i, `otherwise` in the others.
  LR_INLINE Vec keep(Vec x, int i, int half, Vec otherwise) const {
    const Vec place = set1(float(i)), from = load(first + half * kLanes), to = load(last + half * kLanes);
    return ((place >= from) & (place < to)) ? x : otherwise;
  }
};

// A packed block, of one source or several whose logits have one form: keys as rows of units, values as rows of units
// (a row holds kPack keys).
template <class C>
struct Block {
  const char* keys;                // keys x units, padded with zeros to whole key tiles
  const typename C::Unit* values;  // [keys / kPack, e]; Bf16Tiles: transposed
  const float* bias;               // [keys] key_bias + shift, padded with -inf to whole key tiles, log2 units
  int keys_count;
  bool biased;  // whether the logits need bias; else scale > 0 and shift are enough
  float scale;  // logit factor in log2 units
  float shift;  // added to the logits, log2 units
  LaneRange seen;
};

template <class C>
struct Slice {
  typename C::Unit* query;  // [units, kSlice]
  float* out;               // [e, kSlice] of one softmax group, not yet divided by sum
  float* total;             // [e, kSlice] sum over the finished softmax groups, where there are several
  float* max;               // [kSlice] log2 units
  float* sum;               // [kSlice] Σ 2^(logit - max)
  uint32_t beyond;          // bit per query: fp32 cannot hold its logits or sums
  bool started;             // whether the softmax group has had a block of keys
};

// What the slice has summed so far, for a maximum that has moved.
template <class C>
void rescale(const Slice<C>& s, int e, Vec f0, Vec f1) {
  store(s.sum, load(s.sum) * f0);
  store(s.sum + kLanes, load(s.sum + kLanes) * f1);
  for (int c = 0; c < e; ++c) {
    store(s.out + c * kSlice, load(s.out + c * kSlice) * f0);
    store(s.out + c * kSlice + kLanes, load(s.out + c * kSlice + kLanes) * f1);
  }
}

template <class C, bool kBiased>
LR_INLINE void tile_logits(const Block<C>& block, int tile, const typename C::Unit* query, int units,
                           Vec (&x)[kKeyTile][2]) {
  const int rest = block.keys_count - tile * kKeyTile;
  const bool partial = __builtin_expect(rest < kKeyTile, 0);
  const int64_t key_bytes = units * int64_t(sizeof(typename C::Unit));
  score_tile<C>(block.keys + tile * kKeyTile * key_bytes, key_bytes, query, units, x);
  if constexpr (kBiased) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeyTile; ++i) {
      const Vec bias = set1(block.bias[tile * kKeyTile + i]);
      x[i][0] = x[i][0] * block.scale + bias;
      x[i][1] = x[i][1] * block.scale + bias;
    }
  }
  if (partial) {  // here and not by a bias of -inf: an infinite query times the zeros of the padding is NaN
#pragma GCC unroll 16
    for (int i = 0; i < kKeyTile; ++i)
      if (i >= rest) x[i][0] = x[i][1] = set1(-INFINITY);
  }
  if (__builtin_expect(block.seen.cuts(tile * kKeyTile, kKeyTile), 0)) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeyTile; ++i)
      for (int half = 0; half < 2; ++half)
        x[i][half] = block.seen.keep(x[i][half], tile * kKeyTile + i, half, set1(-INFINITY));
  }
}

// Softmax weights of one block into p, and their products with the values into the slice. The running maximum is lazy:
// it is taken from the first keys that the slice sees, and the block is redone only where a weight would reach 2^60.
// Unbiased logits keep their factor out of the scores until the exponent: 2^(scale·s + shift - max) is one fma.
template <class C, bool kBiased>
void attend_block(const Slice<C>& s, const Block<C>& block, int units, int e, typename C::Unit* p, bool first) {
  const int tiles = (block.keys_count + kKeyTile - 1) / kKeyTile;
  const float scale = kBiased ? 1.0f : block.scale, shift = kBiased ? 0.0f : block.shift;
  const Vec floor = set1(-FLT_MAX);
  Vec m0 = load(s.max), m1 = load(s.max + kLanes);
  if (first) {
    Vec x[kKeyTile][2];
    tile_logits<C, kBiased>(block, 0, s.query, units, x);
    Vec top0 = x[0][0], top1 = x[0][1];
#pragma GCC unroll 16
    for (int i = 1; i < kKeyTile; ++i) {
      top0 = max(top0, x[i][0]);
      top1 = max(top1, x[i][1]);
    }
    m0 = max(floor, top0 * scale + shift);
    m1 = max(floor, top1 * scale + shift);
  }
  for (;;) {
    if constexpr (!kBiased) {
      // Beyond 2^28 the fma's unrounded product and the rounded maximum are too far apart for the exponent: round both.
      const Vec limit = set1(0x1p28f);
      if (__builtin_expect(any_greater(max(m0, -m0), limit) || any_greater(max(m1, -m1), limit), 0)) {
        store(s.max, m0);
        store(s.max + kLanes, m1);
        return attend_block<C, true>(s, block, units, e, p, first);
      }
    }
    Vec sum0 = Vec{}, sum1 = Vec{}, top0 = set1(-INFINITY), top1 = top0;
    const Vec z0 = shift - m0, z1 = shift - m1;
    for (int t = 0; t < tiles; ++t) {
      Vec x[kKeyTile][2];
      tile_logits<C, kBiased>(block, t, s.query, units, x);
      typename C::Unit* row = p + t * (kKeyTile / C::kPack) * kSlice;
      if constexpr (std::is_same_v<C, Fp32>) {
        Vec part0 = Vec{}, part1 = Vec{};  // a sum of sums: less rounding than one chain over the block
#pragma GCC unroll 16
        for (int i = 0; i < kKeyTile; ++i) {
          top0 = max(top0, x[i][0]);
          top1 = max(top1, x[i][1]);
          const Vec e0 = exp2<6>(x[i][0] * scale + z0), e1 = exp2<6>(x[i][1] * scale + z1);
          part0 += e0;
          part1 += e1;
          store(row + i * kSlice, e0);
          store(row + i * kSlice + kLanes, e1);
        }
        sum0 += part0;
        sum1 += part1;
      } else {
#if LR_HAS_BF16_DOT
#pragma GCC unroll 16
        for (int i = 0; i < kKeyTile; i += 2) {
          top0 = max(top0, max(x[i][0], x[i + 1][0]));
          top1 = max(top1, max(x[i][1], x[i + 1][1]));
          const VecPair e0 = cut_pairs(exp2<3, true>(x[i][0] * scale + z0), exp2<3, true>(x[i + 1][0] * scale + z0));
          const VecPair e1 = cut_pairs(exp2<3, true>(x[i][1] * scale + z1), exp2<3, true>(x[i + 1][1] * scale + z1));
          sum0 = dot(sum0, e0, ones());
          sum1 = dot(sum1, e1, ones());
          store_pairs(row + i / 2 * kSlice, e0);
          store_pairs(row + i / 2 * kSlice + kLanes, e1);
        }
#endif
      }
    }
    top0 = top0 * scale + shift;
    top1 = top1 * scale + shift;
    if (__builtin_expect(!any_greater(top0 - m0, set1(60.0f)) && !any_greater(top1 - m1, set1(60.0f)), 1)) {
      store(s.sum, load(s.sum) + sum0);
      store(s.sum + kLanes, load(s.sum + kLanes) + sum1);
      store(s.max, m0);
      store(s.max + kLanes, m1);
      break;
    }
    const Vec n0 = max(m0, top0), n1 = max(m1, top1);
    if (!first) rescale(s, e, exp2<6>(m0 - n0), exp2<6>(m1 - n1));
    m0 = n0;
    m1 = n1;
  }
  add_values<C>(block.values, p, (block.keys_count + C::kPack - 1) / C::kPack, e, s.out);
}

}  // namespace
}  // namespace lr::LR_ISA
