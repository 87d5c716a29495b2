// What a block of attention for Hopper works on: one tile of queries of one row, head and class, over all its sources
// or, in small layers, over a part of their keys.
#pragma once
#include "cuda/sm90/config.h"

namespace lr::sm90 {

constexpr float kMax = 3.402823466e38f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.69314718055994531;

// A call and how it is cut into work items. The parameter of the kernels.
struct Problem {
  AttentionParams attention;
  Maps maps;
  bool gathers;       // whether some tile is not copied by TMA
  int32_t works;      // tiles * parts * heads * rows
  int32_t tiles;      // of the queries of a row and head
  int32_t parts;      // of the keys
  float* results;     // with several softmax groups: per block D / 2 x consumer threads, the sum over the groups so far
  float* part_out;    // with several parts: [parts, b, n, h, D] the result of each part
  double* part_sums;  // and [parts, b, n, h, 2] its largest logit and the sum of its weights, which a logarithm beside
                      // a huge logit would lose
};

template <class C>
struct Work {
  int b, h, part;
  int c = 0, first, end;  // queries [first, end) of class c in the order of the queries; none if first >= end
  int row = 0, begin = 0, stop = 0;  // of source `lane`: its row, and the places of the keys to read
  float alpha = 0, beta = 0;         // of source `lane`, in the general kind: the logit is alpha * <q, k> + beta + bias

  LR_DEVICE int tiles() const { return (stop - begin + C::BN - 1) / C::BN; }  // of source `lane`

  // Of query i in part_out and part_sums.
  LR_DEVICE int64_t cell(const AttentionParams& p, int64_t i) const { return ((part * p.b + b) * p.n + i) * p.h + h; }

  LR_DEVICE Work(const Problem& x, int number, int lane) {
    const AttentionParams& p = x.attention;
    int tile = number % x.tiles;
    const int rest = number / x.tiles, heads = static_cast<int>(p.h);
    part = rest % x.parts;
    h = rest / x.parts % heads;
    b = rest / x.parts / heads;
    first = end = 0;
    if (!p.query_order) {
      first = tile * C::BM;
      end = static_cast<int>(p.n);
    } else {
      const int32_t* start = p.class_start + b * p.class_stride;
      int low = load_global(start);
      for (int i = 0; i < p.c; ++i) {
        const int high = load_global(start + i + 1), here = (high - low + C::BM - 1) / C::BM;
        if (tile >= 0 && tile < here) c = i, first = low + tile * C::BM, end = high;
        tile -= here;
        low = high;
      }
    }
    if (lane < p.sources && first < end) read_source(x, p.source[lane]);
    if (x.parts > 1) {  // as many tiles of keys for each part
      const int mine = tiles(), before = sum_before(mine);
      const int64_t all = warp_sum(mine);
      const int low = clamp(int(all * part / x.parts) - before, mine);
      const int high = clamp(int(all * (part + 1) / x.parts) - before, mine);
      begin = low * C::BN;
      stop = high < mine ? high * C::BN : stop;
    }
  }

 private:
  LR_DEVICE static int clamp(int x, int high) { return x < 0 ? 0 : x < high ? x : high; }

  LR_DEVICE void read_source(const Problem& x, const AttentionSource& s) {
    const int wanted = s.rows ? load_global(s.rows + b) : s.r == 1 ? 0 : b;
    if (wanted < 0 || wanted >= s.r || s.v == 0) return;
    row = wanted;
    stop = s.key_index ? load_global(s.key_count + c * s.count_stride[0] + row * s.count_stride[1])
                       : static_cast<int>(s.m);
    if (!C::General) return;
    alpha = x.attention.scale * kLog2e;
    beta = 0;
    if (s.logit_scale) alpha *= load_global(s.logit_scale + b * s.logit_scale_stride[0] + h * s.logit_scale_stride[1]);
    if (s.logit_bias) beta = load_global(s.logit_bias + b * s.logit_bias_stride[0] + h * s.logit_bias_stride[1]);
  }
};

// The natural log sum of exponentials of a softmax with the largest logit `top` and so much weight; -inf for a query
// that sees nothing.
LR_DEVICE void store_lse(const AttentionParams& p, int b, int64_t i, int h, double top, double sum) {
  if (!p.lse) return;
  const double lse = sum == 0 ? -INFINITY : top + double(log2_fast(float(sum))) * kLn2;
  const int64_t at = b * p.lse_stride[0] + i * p.lse_stride[1] + h * p.lse_stride[2];
  if (p.lse_is_double) return store_global(static_cast<double*>(p.lse) + at, lse);
  const bool beyond = fabs(lse) > double(kMax) && fabs(lse) < double(INFINITY);
  store_global(static_cast<float*>(p.lse) + at, beyond ? lse > 0 ? kMax : -kMax : float(lse));
}

LR_DEVICE void store_part_sums(const Problem& x, int64_t cell, double top, double sum) {
  store_global(x.part_sums + 2 * cell, top);
  store_global(x.part_sums + 2 * cell + 1, sum);
}

// The tiles of a work item in the producer's order.
struct Cursor {
  int source = -1, left = 0;  // left: keys of the source from this tile on
  // Goes to the next tile -> how many keys it has. keys: of source `lane`.
  template <int BN>
  LR_DEVICE int next(int keys) {
    left -= BN;
    while (left <= 0) left = shuffle(keys, ++source);
    return left < BN ? left : BN;
  }
};

}  // namespace lr::sm90
