// One block of keys against one slice of queries with AMX tiles: products of 16 x 32 by 32 x 16 bf16 in one
// instruction. Included by attention_kernel.cpp where the instruction set has them.
#pragma once
#include <algorithm>

#include "cpu/attention_block.h"
#include "cpu/tiles.h"

namespace lr::LR_ISA {
namespace {

#if defined(__AMX_BF16__)

static_assert(kSlice == 32);
constexpr int kTileRow = 16;                      // units in a row of a tile, and its rows
constexpr int kValueRow = Bf16Tiles::kBlock / 2;  // units in a row of transposed values: the key pairs of a block
constexpr int kGroup = Bf16Tiles::kKeys;          // keys whose scores are computed at once: a group in this file
constexpr int kSpan = 4;                          // groups whose values are added at once

// 16 x 16 units with rows and columns exchanged.
LR_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int low = i / 4 * 8 + i % 4;  // rows 0-3 and 4-7, then 8-11 and 12-15, of the same columns
    y[low] = _mm512_shuffle_i32x4(x[low], x[low + 4], 0x88);
    y[low + 4] = _mm512_shuffle_i32x4(x[low], x[low + 4], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

// Pairs of value rows -> the transposed values [channels, kValueRow] of one group of 32 keys, zeros after the last.
// row(i) is the i-th value of the group.
template <class Row>
void transpose_values(Row row, int keys, int d, uint32_t* values) {
  for (int c = 0; c < d; c += kTileRow) {
    const __mmask16 mask = static_cast<__mmask16>(d - c >= kTileRow ? 0xffff : (1 << (d - c)) - 1);
    auto half = [&](int i) {
      return i < keys ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row(i) + c)) : _mm512_setzero_si512();
    };
    __m512i pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) pairs[i] = _mm512_or_si512(half(2 * i), _mm512_slli_epi32(half(2 * i + 1), 16));
    transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(values + int64_t(c + i) * kValueRow, pairs[i]);
  }
}

// Computes one block of keys against one slice of queries, kGroup keys (a group) at a time. While the vector units turn
// the scores of a group into weights, the AMX unit computes the scores of the next group and adds the weighted values
// of earlier ones. The two kinds of instruction are interleaved by quarters of a group, so that the reorder buffer
// holds both.
class TileBlock {
 public:
  TileBlock(const Slice<Bf16Tiles>& slice, const Block<Bf16Tiles>& block, int units, int e, uint32_t* p, float* scores)
      : s_(slice), block_(block), units_(units), tiles_((e + kTileRow - 1) / kTileRow), p_(p), scores_(scores) {}

  void attend(bool first) {
    const int groups = (block_.keys_count + kGroup - 1) / kGroup;
    m0_ = load(s_.max), m1_ = load(s_.max + kLanes);
    score(0, 0, units_);
    store_scores(0);
    if (first) raise_maximum(0, set1(-FLT_MAX), set1(-FLT_MAX));
    Vec total0 = load(s_.sum), total1 = load(s_.sum + kLanes), sum0, sum1;
    for (int g = 0; g < groups; ++g) {
      weigh(g, g + 1 < groups, sum0, sum1);
      // Where a sum of weights exceeds 2^60, the maximum moves. Everything weighed with the old one is added first.
      if (__builtin_expect(any_greater(sum0, set1(0x1p60f)) || any_greater(sum1, set1(0x1p60f)), 0)) {
        add_pending(tiles_);
        start_span(g);
        add_pending(tiles_);
        const Vec old0 = m0_, old1 = m1_;
        raise_maximum(g, m0_, m1_);
        const Vec f0 = exp2<6>(old0 - m0_), f1 = exp2<6>(old1 - m1_);
        total0 *= f0;
        total1 *= f1;
        for (int c = 0; c < tiles_ * kTileRow; ++c) {
          store(s_.out + c * kSlice, load(s_.out + c * kSlice) * f0);
          store(s_.out + c * kSlice + kLanes, load(s_.out + c * kSlice + kLanes) * f1);
        }
        weigh(g, false, sum0, sum1);
      }
      total0 += sum0;
      total1 += sum1;
      if (g + 1 - begin_ == kSpan) {
        add_pending(tiles_);
        start_span(g + 1);
      }
    }
    add_pending(tiles_);
    start_span(groups);
    add_pending(tiles_);
    store(s_.sum, total0);
    store(s_.sum + kLanes, total1);
    store(s_.max, m0_);
    store(s_.max + kLanes, m1_);
  }

 private:
  const Slice<Bf16Tiles>& s_;
  const Block<Bf16Tiles>& block_;
  const int units_, tiles_;  // units of a key, and tiles of 16 channels of a value
  uint32_t* const p_;        // 2 spans x kSpan groups x [16 pairs of keys, kSlice]
  float* const scores_;      // 2 groups x [32 keys, kSlice]
  Vec m0_, m1_;              // the running maximum, log2 units
  // Weights are kept for a span of up to kSpan groups, which starts at group begin_. While they are computed, the
  // weighted values of the span before, groups [previous_, begin_), are added to the output, 16 channels (a tile) at a
  // time; tile pending_ is the next.
  int previous_ = 0, begin_ = 0, pending_ = 0, buffer_ = 0;

  void start_span(int g) {
    previous_ = begin_;
    begin_ = g;
    pending_ = 0;
    buffer_ ^= 1;
  }

  uint32_t* weights(int buffer) const { return p_ + buffer * kSpan * kTileRow * kSlice; }

  // Adds the values of the previous span to up to `tiles` more tiles of channels.
  LR_INLINE void add_pending(int tiles) {
    if (previous_ == begin_) pending_ = tiles_;
    for (int end = std::min(pending_ + tiles, tiles_); pending_ < end; pending_ += 2) add_values(pending_);
  }

  // Tiles 0-3 += scores of group g over units [from, to): keys as rows of A, pairs of channels of the queries as rows
  // of B.
  LR_INLINE void score(int g, int from, int to) const {
    const int64_t bytes = units_ * 4;
    const char* keys = block_.keys + g * kGroup * bytes;
    memory_barrier();
    if (from == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int u = from; u < to; u += kTileRow) {
      _tile_loadd(4, keys + u * 4, bytes);
      _tile_loadd(5, keys + u * 4 + kTileRow * bytes, bytes);
      _tile_loadd(6, s_.query + u * kSlice, kSlice * 4);
      _tile_loadd(7, s_.query + u * kSlice + kTileRow, kSlice * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  LR_INLINE void store_scores(int g) const {
    float* to = scores_ + g % 2 * kGroup * kSlice;
    _tile_stored(0, to, kSlice * 4);
    _tile_stored(1, to + kTileRow, kSlice * 4);
    _tile_stored(2, to + kTileRow * kSlice, kSlice * 4);
    _tile_stored(3, to + kTileRow * kSlice + kTileRow, kSlice * 4);
    // past the last key: an infinite query times the zeros of the padding is NaN, which no bias of -inf would hide
    const int first = std::clamp(block_.keys_count - g * kGroup, 0, kGroup);
    std::fill(to + first * kSlice, to + kGroup * kSlice, 0.0f);
  }

  // out += weighted values of the previous span for 16-channel tiles t and, where it exists, t + 1: transposed values
  // as rows of A, pairs of keys of p as rows of B.
  LR_INLINE void add_values(int t) const {
    float* out = s_.out + t * kTileRow * kSlice;
    float* below = out + kTileRow * kSlice;
    const uint32_t* values = block_.values + t * kTileRow * kValueRow + previous_ * kTileRow;
    const uint32_t* p = weights(buffer_ ^ 1);
    const bool two = t + 1 < tiles_;
    memory_barrier();
    _tile_loadd(0, out, kSlice * 4);
    _tile_loadd(1, out + kTileRow, kSlice * 4);
    if (two) {
      _tile_loadd(2, below, kSlice * 4);
      _tile_loadd(3, below + kTileRow, kSlice * 4);
    }
    for (int g = previous_; g < begin_; ++g, values += kTileRow, p += kTileRow * kSlice) {
      _tile_loadd(4, values, kValueRow * 4);
      _tile_loadd(6, p, kSlice * 4);
      _tile_loadd(7, p + kTileRow, kSlice * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, values + kTileRow * kValueRow, kValueRow * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, kSlice * 4);
    _tile_stored(1, out + kTileRow, kSlice * 4);
    if (two) {
      _tile_stored(2, below, kSlice * 4);
      _tile_stored(3, below + kTileRow, kSlice * 4);
    }
  }

  // Writes the softmax weights of group g to p and their sums over the keys to sum0 and sum1. Meanwhile it computes the
  // scores of group g + 1, if `next`, and adds weighted values of the previous span.
  void weigh(int g, bool next, Vec& sum0, Vec& sum1) {
    // As in attend_block: the factor stays out of the scores, except where a bias per key or huge logits forbid it.
    const Vec limit = set1(0x1p28f);
    const bool rounded = block_.biased || any_greater(max(m0_, -m0_), limit) || any_greater(max(m1_, -m1_), limit);
    const int half_units = (units_ / kTileRow + 1) / 2 * kTileRow, share = ((tiles_ + 1) / 2 + kSpan - 1) / kSpan * 2;
    sum0 = sum1 = Vec{};
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (next && quarter == 0) score(g + 1, 0, half_units);
      if (next && quarter == 1) {
        score(g + 1, half_units, units_);
        store_scores(g + 1);
      }
      if (quarter == 2) add_pending(share);
      if (rounded || block_.seen.cuts(g * kGroup, kGroup) || block_.keys_count - g * kGroup < kGroup)
        weigh_quarter<true>(g, quarter, sum0, sum1);
      else
        weigh_quarter<false>(g, quarter, sum0, sum1);
    }
  }

  // kCareful handles a bias per key, huge logits, keys that some queries do not see and the padding after the last key.
  template <bool kCareful>
  LR_INLINE void weigh_quarter(int g, int quarter, Vec& sum0, Vec& sum1) const {
    constexpr int kKeys = kGroup / 4;
    const float* row = scores_ + (g % 2 * kGroup + quarter * kKeys) * kSlice;
    uint32_t* to = weights(buffer_) + ((g - begin_) * kGroup + quarter * kKeys) / 2 * kSlice;
    const float scale = block_.scale;
    const Vec z0 = block_.shift - m0_, z1 = block_.shift - m1_;
    auto exponent = [&](int i, int half) __attribute__((always_inline)) {
      const Vec x = load(row + i * kSlice + half * kLanes);
      if constexpr (kCareful) {
        const int key = g * kGroup + quarter * kKeys + i;
        const Vec logit = x * scale + block_.bias[key] - (half ? m1_ : m0_);
        return block_.seen ? block_.seen.keep(logit, key, half, set1(-INFINITY)) : logit;
      } else {
        return x * scale + (half ? z1 : z0);
      }
    };
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; i += 2) {
      const VecPair e0 = cut_pairs(exp2<3, true>(exponent(i, 0)), exp2<3, true>(exponent(i + 1, 0)));
      const VecPair e1 = cut_pairs(exp2<3, true>(exponent(i, 1)), exp2<3, true>(exponent(i + 1, 1)));
      sum0 = dot(sum0, e0, ones());
      sum1 = dot(sum1, e1, ones());
      store_pairs(to + i / 2 * kSlice, e0);
      store_pairs(to + i / 2 * kSlice + kLanes, e1);
    }
  }

  // Sets the running maximum to the largest of m and the logits of group g.
  void raise_maximum(int g, Vec m0, Vec m1) {
    const float* row = scores_ + g % 2 * kGroup * kSlice;
    for (int i = 0; i < kGroup; ++i, row += kSlice) {
      const float bias = block_.bias[g * kGroup + i];
      Vec x0 = load(row) * block_.scale + bias, x1 = load(row + kLanes) * block_.scale + bias;
      if (block_.seen) {
        x0 = block_.seen.keep(x0, g * kGroup + i, 0, m0);
        x1 = block_.seen.keep(x1, g * kGroup + i, 1, m1);
      }
      m0 = max(m0, x0);
      m1 = max(m1, x1);
    }
    m0_ = m0;
    m1_ = m1;
  }
};

#endif

}  // namespace
}  // namespace lr::LR_ISA
