// multi_source_attention backward, compiled once per instruction set.
//
// With P = exp(logit - lse), dP = <grad_out, V> and dS = P · (dP - <grad_out, out> + grad_lse):
//
//   grad_query = Σ alpha · dS · K     grad_key = Σ alpha · dS · Q     grad_value = Σ P · grad_out
//   grad_key_bias = Σ dS
//
// where alpha = scale · logit_scale is the factor of the scores, and delta = <grad_out, out>.
// P is computed again from lse, so nothing of size N x M is stored. The products over keys hold queries in SIMD lanes
// as the forward pass does; those over queries hold channels in lanes. One thread takes all batch rows that share a row
// of a source, for all heads that share a head of it: it alone adds to that gradient, in a fixed order. All arithmetic
// is fp32.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/attention_block.h"
#include "cpu/attention_sources.h"
#include "cpu/launch.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"
#include "params.h"

namespace lr::LR_ISA {
namespace {

constexpr int kTileQueries = 128;
constexpr int kTileSlices = kTileQueries / kSlice;
constexpr int kBlockKeys = 120;  // a multiple of all key counts of outer_tile
// An lse beyond this is coarse: fp32 logits of its size are rounded too much for exp(logit - lse) to sum to 1. A tile
// with a coarse lse finds the maximum and the sum of its queries again, from logits rounded as those of P.
constexpr double kCoarse = 8192;
// Channel vectors per accumulator tile of the products over queries, and how many keys fit the registers beside them.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kMaxVectors = 5;
constexpr int kKeysFor[kMaxVectors + 1] = {0, 8, 8, 8, 6, 5};
#else
constexpr int kMaxVectors = 3;
constexpr int kKeysFor[kMaxVectors + 1] = {0, 8, 6, 4};
#endif

// Visible keys first .. first + count of a source.
template <class S>
struct KeyBlock {
  const VisibleKeys<S>& keys;
  int source;
  int64_t first;
  int count;
  const TileRanges* ranges;  // or null: all queries of the tile see them

  int64_t token(int i) const { return keys.token(first + i); }
  // Which of them the queries of a slice see; none is empty where all see all.
  LaneRange seen(int slice, float (&from)[kSlice], float (&to)[kSlice]) const {
    if (!ranges || ranges->whole(slice, {first, first + count})) return {};
    return ranges->lanes(slice, first, count, from, to);
  }
};

struct Scratch {
  // one tile of queries, transposed: per slice [d, kSlice], grad_out and out [e, kSlice]
  float *query, *grad_out, *out, *grad_query, *delta, *grad_lse;
  float *lse, *lse_rest;  // [kTileQueries] lse in log2 units and what rounding took from it; in coarse tiles the
                          // maximum in natural units and the log2 of the sum
  // the same queries as rows: [kTileQueries, d and e in whole vectors]
  float *query_rows, *grad_out_rows;
  // per slice [kBlockKeys, kSlice]
  float *p, *ds;
  // keys and values of a block [kBlockKeys, d and e], and what is added to their logits, in the units of lse
  float *keys, *values, *bias;
  int32_t* ranges;  // see TileRanges

  Scratch(int d, int e) {
    lay_out(
        [&](Arena& arena) {
          for (float** x : {&query, &grad_query}) arena.take(*x, size_t(d) * kTileQueries);
          for (float** x : {&grad_out, &out}) arena.take(*x, size_t(e) * kTileQueries);
          for (float** x : {&lse, &lse_rest, &delta, &grad_lse}) arena.take(*x, kTileQueries);
          arena.take(query_rows, round_up(d, kLanes) * kTileQueries);
          arena.take(grad_out_rows, round_up(e, kLanes) * kTileQueries);
          for (float** x : {&p, &ds}) arena.take(*x, size_t(kBlockKeys) * kTileQueries);
          arena.take(keys, size_t(kBlockKeys + kKeyTile) * d);
          arena.take(values, size_t(kBlockKeys + kKeyTile) * e);
          arena.take(bias, kBlockKeys + kKeyTile);
          arena.take(ranges, TileRanges::kRoom * kTileSlices);
        },
        thread_buffer);
  }
};

// out[i][c] += Σ_queries weight[i][query] · rows[query][c] for kKeys keys and kVectors vectors of channels.
template <int kKeys, int kVectors>
LR_INLINE void outer_tile(const float* weight, const float* rows, int64_t width, int slices, int keys, int channels,
                          float* const* out) {
  Vec sum[kKeys][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vec{};
  for (int s = 0; s < slices; ++s, weight += kBlockKeys * kSlice) {
    for (int lane = 0; lane < kSlice; ++lane, rows += width) {
      Vec x[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) x[j] = load(rows + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const Vec w = set1(weight[i * kSlice + lane]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[i][j] += w * x[j];
      }
    }
  }
  for (int i = 0; i < std::min(kKeys, keys); ++i) {
    alignas(64) float row[kVectors * kLanes];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(row + j * kLanes, sum[i][j]);
    for (int c = 0; c < channels; ++c) out[i][c] += row[c];
  }
}

// The sum of outer_tile for all keys of a block and kVectors vectors of channels from channel c on.
template <int kVectors>
void outer_strip(const float* weight, const float* rows, int64_t width, int slices, int keys, int c, int channels,
                 float* const* out) {
  constexpr int kKeys = kKeysFor[kVectors];
  for (int k = 0; k < keys; k += kKeys) {
    float* at[kKeys];
    for (int i = 0; i < std::min(kKeys, keys - k); ++i) at[i] = out[k + i] + c;
    outer_tile<kKeys, kVectors>(weight + k * kSlice, rows + c, width, slices, keys - k, channels, at);
  }
}

template <int kVectors>
void outer_strip_of(int vectors, const float* weight, const float* rows, int64_t width, int slices, int keys, int c,
                    int channels, float* const* out) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) return outer_strip<kVectors>(weight, rows, width, slices, keys, c, channels, out);
    outer_strip_of<kVectors - 1>(vectors, weight, rows, width, slices, keys, c, channels, out);
  }
}

// out[key][c] += Σ_queries weight[key][query] · rows[query][c]; the channels in strips of about equal width.
void add_outer(const float* weight, const float* rows, int64_t width, int slices, int keys, int d, float* const* out) {
  int vectors = int(width / kLanes);
  for (int c = 0; vectors > 0;) {
    const int strips = (vectors + kMaxVectors - 1) / kMaxVectors, now = (vectors + strips - 1) / strips;
    outer_strip_of<kMaxVectors>(now, weight, rows, width, slices, keys, c, std::min(d - c, now * kLanes), out);
    vectors -= now;
    c += now * kLanes;
  }
}

template <class S>
class Backward {
 public:
  explicit Backward(const AttentionBackwardParams& params)
      : g(params),
        p(params.forward),
        d(int(p.d)),
        e(int(p.e)),
        query_width(int(round_up(d, kLanes))),
        value_width(int(round_up(e, kLanes))) {}

  void run(int64_t b, int64_t h, const Scratch& scratch) const {
    each_tile(p, b, h, kTileQueries, [&](const QueryTile& tile) { run_tile(tile, scratch); });
  }

 private:
  const AttentionBackwardParams& g;
  const AttentionParams& p;
  const int d, e, query_width, value_width;  // widths: d and e rounded up to whole vectors

  void run_tile(const QueryTile& tile, const Scratch& scratch) const {
    const bool coarse = load_queries(tile, scratch);
    if (coarse) {
      std::fill_n(scratch.lse, kTileQueries, -FLT_MAX);
      std::fill_n(scratch.lse_rest, kTileQueries, 0.0f);
      each_block(tile, scratch, [&](const KeyBlock<S>& block) {
        const float alpha = load_keys(block, true, scratch);
        for (int s = 0; s < tile.slices(); ++s) add_to_sums(block, scratch, s, alpha);
      });
      for (int i = 0; i < kTileQueries; ++i) {
        if (scratch.lse_rest[i] == 0 || i >= tile.count) scratch.lse[i] = INFINITY;  // sees nothing: P = 0
        scratch.lse_rest[i] = scratch.lse[i] == INFINITY ? 0.0f : std::log2(scratch.lse_rest[i]);
      }
    }
    each_block(tile, scratch, [&](const KeyBlock<S>& block) { run_block(tile, block, coarse, scratch); });
    store_grad_query(tile, scratch);
  }

  template <class Visit>
  void each_block(const QueryTile& tile, const Scratch& x, const Visit& visit) const {
    TileRanges ranges(x.ranges, tile.slices());
    for (int i = 0; i < p.sources; ++i) {
      const AttentionSource& source = p.source[i];
      const VisibleKeys<S> keys(source, tile);
      Places seen{0, keys.count};
      if (source.key_range && keys.row >= 0) {
        ranges.read(p, tile, source, keys);
        seen = ranges.hull(0, tile.slices());
      }
      for (int64_t k = seen.first; k < seen.last; k += kBlockKeys)
        visit(KeyBlock<S>{keys, i, k, int(std::min<int64_t>(kBlockKeys, seen.last - k)),
                          source.key_range ? &ranges : nullptr});
    }
  }

  // Loads a tile's queries and what belongs to them. Returns whether the lse of one of them is coarse (see kCoarse).
  bool load_queries(const QueryTile& tile, const Scratch& x) const {
    bool coarse = false;
    const int padded = tile.slices() * kSlice;
    std::fill_n(x.query_rows, padded * query_width, 0.0f);
    std::fill_n(x.grad_out_rows, padded * value_width, 0.0f);
    const TileRows<const S> query(p, tile, static_cast<const S*>(p.query), p.query_stride);
    const TileRows<const S> out(p, tile, static_cast<const S*>(p.out), p.out_stride);
    const TileRows<const S> grad_out(p, tile, static_cast<const S*>(g.grad_out), g.grad_out_stride);
    const TileRows<const double> lses(p, tile, static_cast<const double*>(p.lse), p.lse_stride);
    const TileRows<const float> grad_lses(p, tile, g.grad_lse, g.grad_lse_stride);
    for (int position = 0; position < padded; ++position) {
      double lse = INFINITY;  // P = 0
      float grad_lse = 0;
      if (position < tile.count) {
        to_floats(query(position), d, x.query_rows + position * query_width);
        to_floats(grad_out(position), e, x.grad_out_rows + position * value_width);
        if (g.grad_lse) grad_lse = *grad_lses(position);
        lse = *lses(position);
        coarse |= std::isfinite(lse) && std::abs(lse) > kCoarse;
        lse = lse == -INFINITY ? INFINITY : lse * 1.4426950408889634;  // -inf: sees nothing
      }
      x.lse[position] = static_cast<float>(lse);
      x.lse_rest[position] = std::isfinite(lse) ? static_cast<float>(lse - x.lse[position]) : 0.0f;
      x.grad_lse[position] = grad_lse;  // apart from delta: dP and delta nearly cancel where one key has all the weight
    }
    for (int s = 0; s < tile.slices(); ++s) {
      auto rows_of = [&](const float* rows, int width) {
        return [=](int64_t lane) { return rows + (s * kSlice + lane) * width; };
      };
      rows_to_columns(rows_of(x.query_rows, query_width), kSlice, d, x.query + s * d * kSlice);
      rows_to_columns(rows_of(x.grad_out_rows, value_width), kSlice, e, x.grad_out + s * e * kSlice);
      auto out_row = [&](int64_t lane) { return out(std::min(s * kSlice + int(lane), tile.count - 1)); };
      rows_to_columns(out_row, kSlice, e, x.out);
      lane_products(x.grad_out + s * e * kSlice, x.out, x.delta + s * kSlice);
    }
    std::fill_n(x.grad_query, tile.slices() * d * kSlice, 0.0f);
    std::fill(x.delta + tile.count, x.delta + padded, 0.0f);
    return coarse;
  }

  // Σ_c a[c] · b[c] of each lane, rounded as score_tile rounds dP: where one key has all the weight, the two cancel.
  void lane_products(const float* a, const float* b, float* products) const {
    for (int j = 0; j < kSlice; j += kLanes) {
      Vec sum{};
      for (int u = 0; u < e; u += kChain) {
        Vec part{};
        for (int c = u; c < std::min(e, u + kChain); ++c) part += load(a + c * kSlice + j) * load(b + c * kSlice + j);
        sum += part;
      }
      store(products + j, sum);
    }
  }

  // row(i) for the keys of a block as fp32, zeros up to whole key tiles.
  template <class Row>
  static void load_rows(const Row& row, int count, int channels, float* to) {
    for (int i = 0; i < count; ++i) to_floats(row(i), channels, to + i * channels);
    std::fill_n(to + count * channels, (round_up(count, kKeyTile) - count) * channels, 0.0f);
  }

  // Loads the keys of a block and what is added to their logits: in natural units in a coarse tile, else in log2 units.
  // Returns the factor of the scores.
  float load_keys(const KeyBlock<S>& block, bool coarse, const Scratch& x) const {
    const VisibleKeys<S>& keys = block.keys;
    load_rows([&](int i) { return keys.key(block.token(i)); }, block.count, d, x.keys);
    for (int i = 0; i < block.count; ++i) {
      const int64_t token = block.token(i);
      if (coarse) {
        const double sum = double(keys.bias_of(token)) + keys.logit_bias;
        x.bias[i] = std::isfinite(sum) ? float(std::clamp<double>(sum, -FLT_MAX, FLT_MAX)) : float(sum);
      } else {
        x.bias[i] = keys.log2_bias_of(token);
      }
    }
    std::fill(x.bias + block.count, x.bias + round_up(block.count, kKeyTile), -INFINITY);
    return p.scale * keys.logit_scale;
  }

  // score · alpha + bias, for both passes over a coarse tile, so that they round alike. A finite logit stays finite:
  // only a bias of -inf hides a key.
  static LR_INLINE Vec coarse_logit(Vec score, float alpha, float bias) {
    const Vec least = set1(bias == -INFINITY ? bias : -FLT_MAX);
    return max(least, min(score * alpha + bias, set1(FLT_MAX)));  // in this order a NaN stays
  }

  // The running maximum and sum of one slice, in lse and lse_rest.
  void add_to_sums(const KeyBlock<S>& block, const Scratch& x, int s, float alpha) const {
    const float* query = x.query + s * d * kSlice;
    const int count = block.count;
    alignas(64) float from[kSlice], to[kSlice];
    const LaneRange seen = block.seen(s, from, to);
    for (int k = 0; k < count; k += kKeyTile) {
      Vec t[kKeyTile][2];
      score_tile<Fp32>(reinterpret_cast<const char*>(x.keys + k * d), d * 4, query, d, t);
      for (int i = 0; i < std::min(kKeyTile, count - k); ++i)
        for (int j = 0; j < 2; ++j) {
          float *top = x.lse + s * kSlice + j * kLanes, *sum = x.lse_rest + s * kSlice + j * kLanes;
          Vec logit = coarse_logit(t[i][j], alpha, x.bias[k + i]);
          if (seen) logit = seen.keep(logit, k + i, j, set1(-INFINITY));
          const Vec old = load(top), now = max(old, logit);
          store(sum, load(sum) * exp2<6>((old - now) * kLog2E) + exp2<6>((logit - now) * kLog2E));
          store(top, now);
        }
    }
  }

  void run_block(const QueryTile& tile, const KeyBlock<S>& block, bool coarse, const Scratch& x) const {
    const VisibleKeys<S>& keys = block.keys;
    const AttentionSource& source = p.source[block.source];
    const int count = block.count, slices = tile.slices();
    const float alpha = load_keys(block, coarse, x);
    load_rows([&](int i) { return keys.value(block.token(i)); }, count, e, x.values);
    float* grad_bias = g.grad_key_bias[block.source];
    float bias_sums[kBlockKeys] = {};

    for (int s = 0; s < slices; ++s) weigh(block, x, s, alpha, coarse, grad_bias ? bias_sums : nullptr);

    float *key_rows[kBlockKeys], *value_rows[kBlockKeys];
    const int64_t heads = source.k, head = tile.h / source.heads_per_key_head;
    float* grad_key = g.grad_key[block.source] + (keys.row * source.m * heads + head) * d;
    float* grad_value = g.grad_value[block.source] + (keys.row * source.v * heads + head) * e;
    for (int i = 0; i < count; ++i) {
      const int64_t token = block.token(i);
      key_rows[i] = grad_key + token * heads * d;
      value_rows[i] = grad_value + keys.value_token(token) * heads * e;
    }
    add_outer(x.p, x.grad_out_rows, value_width, slices, count, e, value_rows);
    add_outer(x.ds, x.query_rows, query_width, slices, count, d, key_rows);
    if (grad_bias) {
      grad_bias += (tile.h * source.bias_rows + (source.bias_rows > 1 ? keys.row : 0)) * source.m;
      for (int i = 0; i < count; ++i) grad_bias[block.token(i)] += bias_sums[i];
    }
  }

  // P and alpha · dS of one slice, and their part in grad_query.
  void weigh(const KeyBlock<S>& block, const Scratch& x, int s, float alpha, bool coarse, float* bias_sums) const {
    const float *query = x.query + s * d * kSlice, *grad_out = x.grad_out + s * e * kSlice;
    const int count = block.count;
    alignas(64) float from[kSlice], to[kSlice];
    const LaneRange seen = block.seen(s, from, to);
    const Vec l0 = load(x.lse + s * kSlice), l1 = load(x.lse + s * kSlice + kLanes);
    const Vec d0 = load(x.delta + s * kSlice), d1 = load(x.delta + s * kSlice + kLanes);
    const Vec g0 = load(x.grad_lse + s * kSlice), g1 = load(x.grad_lse + s * kSlice + kLanes);
    const Vec r0 = load(x.lse_rest + s * kSlice), r1 = load(x.lse_rest + s * kSlice + kLanes);
    const float scale = alpha * kLog2E;
    float *p_rows = x.p + s * kBlockKeys * kSlice, *ds_rows = x.ds + s * kBlockKeys * kSlice;
    for (int k = 0; k < count; k += kKeyTile) {
      Vec t[kKeyTile][2];
      score_tile<Fp32>(reinterpret_cast<const char*>(x.keys + k * d), d * 4, query, d, t);
      if (__builtin_expect(coarse, 0)) {
        for (int i = 0; i < kKeyTile; ++i) {
          for (int j = 0; j < 2; ++j) {
            const Vec down = coarse_logit(t[i][j], alpha, x.bias[k + i]) - (j ? l1 : l0);
            t[i][j] = exp2<6>(min(down * kLog2E - (j ? r1 : r0), Vec{}));
            store(p_rows + (k + i) * kSlice + j * kLanes, t[i][j]);
          }
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kKeyTile; ++i) {
          const Vec z0 = x.bias[k + i] - l0, z1 = x.bias[k + i] - l1;
          // P is at most 1: what the rounding of lse adds to a huge logit must not become an infinity
          store(p_rows + (k + i) * kSlice, exp2<6>(min(t[i][0] * scale + z0 - r0, Vec{})));
          store(p_rows + (k + i) * kSlice + kLanes, exp2<6>(min(t[i][1] * scale + z1 - r1, Vec{})));
        }
      }
      score_tile<Fp32>(reinterpret_cast<const char*>(x.values + k * e), e * 4, grad_out, e, t);
#pragma GCC unroll 16
      for (int i = 0; i < kKeyTile; ++i) {
        const int at = (k + i) * kSlice;
        Vec e0 = load(p_rows + at) * (t[i][0] - d0 + g0), e1 = load(p_rows + at + kLanes) * (t[i][1] - d1 + g1);
        if (__builtin_expect(bool(seen), 0)) {
          store(p_rows + at, seen.keep(load(p_rows + at), k + i, 0, Vec{}));
          store(p_rows + at + kLanes, seen.keep(load(p_rows + at + kLanes), k + i, 1, Vec{}));
          e0 = seen.keep(e0, k + i, 0, Vec{});
          e1 = seen.keep(e1, k + i, 1, Vec{});
        }
        store(ds_rows + at, e0 * alpha);
        store(ds_rows + at + kLanes, e1 * alpha);
        if (bias_sums && k + i < count) {
          const Vec both = e0 + e1;
          for (int lane = 0; lane < kLanes; ++lane) bias_sums[k + i] += both[lane];
        }
      }
    }
    add_values<Fp32>(x.keys, ds_rows, count, d, x.grad_query + s * d * kSlice);
  }

  void store_grad_query(const QueryTile& tile, const Scratch& x) const {
    const int64_t row = p.h * d;
    const TileRows<S> grad(p, tile, static_cast<S*>(g.grad_query), {p.n * row, row, d});
    for (int s = 0; s < tile.slices(); ++s)
      columns_to_rows(x.grad_query + s * d * kSlice, kSlice, std::min(kSlice, tile.count - s * kSlice), d,
                      [&](int64_t lane) { return grad(s * kSlice + lane); });
  }
};

// ---- which batch rows share a row of a source ----

struct BatchRow {
  int64_t leader;  // the first batch row that this one is joined to, directly or not
};

int64_t leader_of(std::vector<BatchRow>& rows, int64_t b) {
  while (rows[b].leader != b) b = rows[b].leader = rows[rows[b].leader].leader;
  return b;
}

std::vector<BatchRow> join_batch_rows(const AttentionBackwardParams& g) {
  const AttentionParams& p = g.forward;
  std::vector<BatchRow> rows(p.b);
  for (int64_t b = 0; b < p.b; ++b) rows[b].leader = b;
  for (int i = 0; i < p.sources; ++i) {
    const AttentionSource& source = p.source[i];
    const bool one = g.grad_key_bias[i] && source.bias_rows == 1;  // all readers add to one row of grad_key_bias
    std::vector<BatchRow> reader(std::max<int64_t>(source.r, 1), BatchRow{-1});
    for (int64_t b = 0; b < p.b; ++b) {
      const int64_t row = row_of(source, b);
      if (row < 0) continue;
      BatchRow& first = reader[one ? 0 : row];
      if (first.leader < 0) first.leader = b;
      const int64_t x = leader_of(rows, first.leader), y = leader_of(rows, b);
      rows[std::max(x, y)].leader = std::min(x, y);
    }
  }
  for (int64_t b = 0; b < p.b; ++b) rows[b].leader = leader_of(rows, b);
  return rows;
}

int64_t least_common_multiple(int64_t a, int64_t b) {
  int64_t multiple = a;
  while (multiple % b) multiple += a;
  return multiple;
}

template <class S>
void backward(const AttentionBackwardParams& g, const Parallel& parallel) {
  const std::vector<BatchRow> rows = join_batch_rows(g);
  struct Job {
    const AttentionBackwardParams& g;
    const std::vector<BatchRow>& rows;
    int64_t heads = 1;  // that one thread takes: whole groups of all sources
    std::atomic<int64_t> next{0};
  } job{g, rows};
  for (int i = 0; i < g.forward.sources; ++i)
    job.heads = least_common_multiple(job.heads, g.forward.source[i].heads_per_key_head);
  auto worker = [](void* context, int64_t) {
    Job& job = *static_cast<Job*>(context);
    const Backward<S> backward(job.g);
    const Scratch scratch(int(job.g.forward.d), int(job.g.forward.e));
    const int64_t groups = job.g.forward.h / job.heads, items = int64_t(job.rows.size()) * groups;
    for (int64_t i; (i = job.next.fetch_add(1)) < items;) {
      const int64_t leader = i / groups, first = i % groups * job.heads;
      for (int64_t b = leader; b < int64_t(job.rows.size()); ++b)
        for (int64_t h = first; job.rows[b].leader == leader && h < first + job.heads; ++h) backward.run(b, h, scratch);
    }
  };
  parallel.run(parallel.threads, worker, &job);
}

}  // namespace

void attention_backward_kernel(const AttentionBackwardParams& p, const Parallel& parallel) {
  if (p.forward.b == 0 || p.forward.n == 0 || p.forward.h == 0) return;
  with_element(p.forward.dtype, [&](auto x) { backward<decltype(x)>(p, parallel); });
}

}  // namespace lr::LR_ISA
