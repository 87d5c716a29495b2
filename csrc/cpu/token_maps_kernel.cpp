// attention_with_token_maps for one instruction set (LR_ISA): queries in SIMD lanes, keys and values as scalars, so the
// softmax over the few text tokens needs no sum across lanes.
#include <algorithm>
#include <cmath>

#include "cpu/launch.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace lr::LR_ISA {
namespace {

constexpr int kQueries = 2 * kLanes;         // of one slice: two vectors
constexpr int64_t kTileQueries = 128;        // of one tile, a work item; a head's keys are converted once for them
constexpr int64_t kKeyBlock = 128;           // each block's sums start at 0, which keeps fp32 rounding small
constexpr int kTile = kLanes == 16 ? 8 : 4;  // keys or channels whose sums stay in registers
static_assert(kTileQueries % kQueries == 0);

// Keys or values of one head as floats: in place, or converted to [m, d].
struct Rows {
  const float* data;
  int64_t stride;
};

Rows float_rows(const float* x, int64_t stride, int64_t, int64_t, float*) { return {x, stride}; }

template <class T>
Rows float_rows(const T* x, int64_t stride, int64_t m, int64_t d, float* copy) {
  for (int64_t j = 0; j < m; ++j) to_floats(x + j * stride, d, copy + j * d);
  return {copy, d};
}

// 2^(x - 16) for x <= 0, with a relative error of 1e-7. The factor 2^-16 keeps the sum of up to 65,536 weighted values
// within fp32 where their mean is. NaN stays NaN; below -110 the result is 0, or with AVX-512 may still be a number.
LR_INLINE Vec weight(Vec x) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(x, 0), n = x - f - 16.0f;  // x - round(x), which is 0 for -Inf
#else
  const VecInt underflow = x < set1(-110.0f);
  x = max(set1(-110.0f), x);
  const Vec rounded = x + 12583023.0f;  // 1.5 * 2^23 + 127 - 16: the integer part, as an exponent, in the low bits
  const Vec f = x - (rounded - 12583023.0f);
#endif
  Vec p = f * 0.0001534581242594868f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  p *= (Vec)((VecBits)rounded << 23);
  return (Vec)((VecInt)p & ~underflow);
#endif
}

// scores [kKeys, kQueries] = sign * K Q^T for kKeys keys; `most` is the running maximum.
template <int kKeys>
LR_INLINE void score_tile(const float* key, int64_t stride, const float* query, int64_t d, float sign, float* scores,
                          Vec (&most)[2]) {
  Vec sum[kKeys][2];
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; ++j) sum[j][0] = sum[j][1] = Vec{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < d; ++i) {
    const Vec q0 = load(query + i * kQueries), q1 = load(query + i * kQueries + kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
      const Vec k = set1(key[j * stride + i]);
      sum[j][0] += k * q0;
      sum[j][1] += k * q1;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec s = sum[j][v] * sign;
      store(scores + j * kQueries + v * kLanes, s);
      most[v] = max(s, most[v]);
    }
}

template <int kKeys>
LR_INLINE void score_keys(const Rows& key, int64_t m, const float* query, int64_t d, float sign, float* scores,
                          Vec (&most)[2], int64_t j = 0) {
  for (; j + kKeys <= m; j += kKeys)
    score_tile<kKeys>(key.data + j * key.stride, key.stride, query, d, sign, scores + j * kQueries, most);
  if constexpr (kKeys > 1) score_keys<kKeys / 2>(key, m, query, d, sign, scores, most, j);
}

// out [kChannels, kQueries] (+)= V^T P over the keys of one block.
template <int kChannels>
LR_INLINE void value_tile(const float* value, int64_t stride, const float* p, int64_t keys, bool first, float* out) {
  Vec sum[kChannels][2];
#pragma GCC unroll 8
  for (int i = 0; i < kChannels; ++i) sum[i][0] = sum[i][1] = Vec{};
#pragma GCC unroll 2
  for (int64_t j = 0; j < keys; ++j) {
    const Vec p0 = load(p + j * kQueries), p1 = load(p + j * kQueries + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kChannels; ++i) {
      const Vec x = set1(value[j * stride + i]);
      sum[i][0] += x * p0;
      sum[i][1] += x * p1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kChannels; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* o = out + i * kQueries + v * kLanes;
      store(o, first ? sum[i][v] : load(o) + sum[i][v]);
    }
}

template <int kChannels>
LR_INLINE void value_channels(const float* value, int64_t stride, const float* p, int64_t keys, bool first, int64_t d,
                              float* out, int64_t i = 0) {
  for (; i + kChannels <= d; i += kChannels)
    value_tile<kChannels>(value + i, stride, p, keys, first, out + i * kQueries);
  if constexpr (kChannels > 1) value_channels<kChannels / 2>(value, stride, p, keys, first, d, out, i);
}

// Scores [m, kQueries] -> 2^(factor * (score - most) - 16), in place; returns 1 / sum in `inverse`. The difference
// comes first: its rounding is relative to the difference, not to the score.
void exponentials(float* scores, int64_t m, float factor, const Vec (&most)[2], Vec (&inverse)[2]) {
  Vec total[2] = {};
  for (int64_t start = 0; start < m; start += kKeyBlock) {
    Vec part[2] = {};
    for (int64_t j = start; j < std::min(start + kKeyBlock, m); ++j)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* s = scores + j * kQueries + v * kLanes;
        const Vec e = weight((load(s) - most[v]) * factor);
        store(s, e);
        part[v] += e;
      }
    for (int v = 0; v < 2; ++v) total[v] += part[v];
  }
  for (int v = 0; v < 2; ++v) inverse[v] = 1.0f / total[v];
}

bool any_nan(const Vec (&x)[2]) {
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= std::isnan(x[0][i]) || std::isnan(x[1][i]);
  return found;
}

// `exponentials` of scores in double, for queries whose scores fp32 cannot hold. They keep their order, and what is not
// finite in a query or key stays NaN.
void wide_exponentials(const Rows& key, int64_t m, const float* query, int64_t d, double scale, float* scores,
                       Vec (&inverse)[2]) {
  double* logits;  // stored: sum * scale fused into the subtraction of `most` would round otherwise than `most`
  const Memory memory = lay_out([&](Arena& arena) { arena.take(logits, m); }, allocate);
  for (int64_t q = 0; q < kQueries; ++q) {
    double most = -INFINITY, total = 0;
    for (int64_t j = 0; j < m; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < d; ++i) sum += double(key.data[j * key.stride + i]) * double(query[i * kQueries + q]);
      logits[j] = sum * scale;
      most = std::max(most, logits[j]);
    }
    for (int64_t j = 0; j < m; ++j) {
      const double weight = std::exp(logits[j] - most) / 65536;
      scores[j * kQueries + q] = float(weight);
      total += weight;
    }
    inverse[q / kLanes][q % kLanes] = float(1 / total);
  }
}

// Of one thread.
struct Scratch {
  float* key;     // [m, d], for 16-bit dtypes
  float* value;   // [m, d], for 16-bit dtypes
  float* query;   // [d, kQueries]
  float* scores;  // [m, kQueries]
  float* out;     // [d, kQueries]
  float* maps;    // [block, t, kQueries]

  Scratch(const TokenMapsParams& p, int64_t converted)
      : memory_(lay_out(
            [&](Arena& arena) {
              arena.take(key, converted);
              arena.take(value, converted);
              arena.take(query, kQueries * p.d);
              arena.take(scores, kQueries * p.m);
              arena.take(out, kQueries * p.d);
              arena.take(maps, kTileQueries * p.t);
            },
            allocate)) {}

 private:
  const Memory memory_;
};

template <class T>
void attend(const TokenMapsParams& p, Scratch& scratch, int64_t b, int64_t first, int64_t count) {
  const float factor = std::fabs(p.scale) * kLog2E, sign = p.scale < 0 ? -1.0f : 1.0f;
  const float share = 1.0f / static_cast<float>(p.h);
  const int32_t* chosen = p.token_indices + b * p.token_stride;
  std::fill(scratch.maps, scratch.maps + kTileQueries * p.t, 0.0f);
  for (int64_t h = 0; h < p.h; ++h) {
    const auto head = [&](const void* x, const int64_t (&stride)[3]) {
      return static_cast<const T*>(x) + b * stride[0] + h * stride[2];
    };
    const Rows key = float_rows(head(p.key, p.key_stride), p.key_stride[1], p.m, p.d, scratch.key);
    const Rows value = float_rows(head(p.value, p.value_stride), p.value_stride[1], p.m, p.d, scratch.value);
    for (int64_t start = 0; start < count; start += kQueries) {
      const int64_t n = std::min<int64_t>(kQueries, count - start);
      const T* query = head(p.query, p.query_stride) + (first + start) * p.query_stride[1];
      rows_to_columns([&](int64_t i) { return query + std::min(i, n - 1) * p.query_stride[1]; }, kQueries, p.d,
                      scratch.query);

      Vec most[2] = {set1(-INFINITY), set1(-INFINITY)}, inverse[2];
      score_keys<kTile>(key, p.m, scratch.query, p.d, sign, scratch.scores, most);
      exponentials(scratch.scores, p.m, factor, most, inverse);
      if (any_nan(inverse)) wide_exponentials(key, p.m, scratch.query, p.d, p.scale, scratch.scores, inverse);

      for (int64_t t = 0; t < p.t; ++t)
        for (int v = 0; v < 2; ++v) {
          float* sum = scratch.maps + (start * p.t + t * kQueries) + v * kLanes;
          store(sum, load(sum) + load(scratch.scores + chosen[t] * kQueries + v * kLanes) * inverse[v] * share);
        }

      for (int64_t j = 0; j < p.m; j += kKeyBlock)
        value_channels<kTile>(value.data + j * value.stride, value.stride, scratch.scores + j * kQueries,
                              std::min(kKeyBlock, p.m - j), j == 0, p.d, scratch.out);
      for (int64_t i = 0; i < p.d; ++i)
        for (int v = 0; v < 2; ++v) {
          float* o = scratch.out + i * kQueries + v * kLanes;
          store(o, load(o) * inverse[v]);
        }
      T* out = static_cast<T*>(p.out) + b * p.out_stride[0] + h * p.out_stride[2];
      columns_to_rows(scratch.out, kQueries, n, p.d,
                      [&](int64_t i) { return out + (first + start + i) * p.out_stride[1]; });
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t t = 0; t < p.t; ++t)
      p.maps[(b * p.n + first + i) * p.t + t] = scratch.maps[(i / kQueries * p.t + t) * kQueries + i % kQueries];
}

template <class T>
void no_keys(const TokenMapsParams& p) {
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t i = 0; i < p.n; ++i)
      for (int64_t h = 0; h < p.h; ++h) {
        T* out = static_cast<T*>(p.out) + b * p.out_stride[0] + i * p.out_stride[1] + h * p.out_stride[2];
        std::memset(out, 0, p.d * sizeof(T));
      }
}

struct Work {
  const TokenMapsParams& p;
  int64_t tiles, workers;
};

// Each worker takes an equal run of (row, tile) items, so that scratch is allocated once per thread.
template <class T>
void run_items(void* context, int64_t worker) {
  const auto& [p, tiles, workers] = *static_cast<const Work*>(context);
  const int64_t items = p.b * tiles;
  Scratch scratch(p, sizeof(T) < sizeof(float) ? p.m * p.d : 0);
  for (int64_t item = items * worker / workers; item < items * (worker + 1) / workers; ++item) {
    const int64_t first = item % tiles * kTileQueries;
    attend<T>(p, scratch, item / tiles, first, std::min(kTileQueries, p.n - first));
  }
}

template <class T>
void run(const TokenMapsParams& p, const Parallel& parallel) {
  if (p.m == 0) return no_keys<T>(p);
  const int64_t tiles = (p.n + kTileQueries - 1) / kTileQueries;
  Work work{p, tiles, std::min<int64_t>(parallel.threads, p.b * tiles)};
  parallel.run(work.workers, run_items<T>, &work);
}

}  // namespace

void token_maps_kernel(const TokenMapsParams& p, const Parallel& parallel) {
  with_element(p.dtype, [&](auto x) { run<decltype(x)>(p, parallel); });
}

}  // namespace lr::LR_ISA
