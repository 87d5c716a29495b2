// multi_source_attention forward, compiled once per instruction set.
//
// Queries sit in SIMD lanes: a slice is 2 vectors of queries, its scores and its output are held transposed (one row
// per key or channel, one column per query), so max and sum are vertical and no lane is lost at any head_dim. One
// thread takes a tile of queries of one batch row, head and class, and walks the visible keys of all sources in blocks;
// a block is gathered and packed once and used by all slices of the tile. Nothing of size N x M is ever stored.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/attention_block.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_wide.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"
#include "params.h"

namespace lr::LR_ISA {

void attention_kernel(const AttentionParams& p, const Parallel& parallel);

namespace {

constexpr int kMaxSlices = 32;            // slices in a tile
constexpr size_t kTileBytes = 384 << 10;  // of queries and outputs in a tile: they share the L2 cache with a block
constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.693147180559945309417;
constexpr float kFar = 0x1p120f;  // logits beyond this, in log2 units, come near fp32's end

// ---- packing ----

template <class C>
int units_of(int d) {
  return int(round_up((d + C::kPack - 1) / C::kPack, C::kUnits));
}

// Row-wise copy into units: fp32 values, or the 16-bit elements themselves, zeros after the last.
template <class S, class C>
LR_INLINE void pack_row(const S* from, int d, typename C::Unit* to) {
  if constexpr (std::is_same_v<C, Fp32>) {
    for (int c = 0; c < d; ++c) to[c] = to_float(from[c]);
  } else {
    for (int u = d / 2; u < units_of<C>(d); ++u) to[u] = 0;
    std::memcpy(to, from, d * sizeof(S));
  }
}

// A row of values: fp32, or pairs of two keys per channel. `odd` is null after the last of an odd number of keys.
template <class S, class C>
LR_INLINE void pack_values(const S* even, [[maybe_unused]] const S* odd, int d, typename C::Unit* to) {
  if constexpr (std::is_same_v<C, Fp32>) {
    for (int c = 0; c < d; ++c) to[c] = to_float(even[c]);
  } else if (odd) {
    for (int c = 0; c < d; ++c) to[c] = uint32_t(even[c].bits) | uint32_t(odd[c].bits) << 16;
  } else {
    for (int c = 0; c < d; ++c) to[c] = even[c].bits;
  }
}

// Two channels that move as the bits of one float.
struct Pair {
  uint16_t bits[2];
};
LR_INLINE float to_float(const Pair& x) {
  float bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
LR_INLINE Vec load_as_float(const Pair* p) {
  Vec bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

// ---- one tile of queries ----

struct QueryTile {
  int64_t b, query_class, start;  // start: position in query_order
  int count;
};

// Scratch of one thread, laid out for a head_dim.
template <class C>
struct Scratch {
  std::vector<Slice<C>> slices;
  typename C::Unit *keys, *values, *p;
  float *bias, *factor, *scores;
  int units;

  static size_t slice_bytes(int d, bool several_groups) {
    const size_t channels = round_up(d, C::kChannels), rows = (several_groups ? 2 * channels : channels) + 2;
    return units_of<C>(d) * kSlice * sizeof(typename C::Unit) + rows * kSlice * sizeof(float);
  }

  Scratch(int d, int count, bool several_groups) : slices(count), units(units_of<C>(d)) {
    Arena measure;
    lay_out(measure, d, several_groups);
    Arena arena(thread_buffer(measure.used()));
    lay_out(arena, d, several_groups);
  }

 private:
  void lay_out(Arena& arena, int d, bool several_groups) {
    const size_t channels = round_up(d, C::kChannels);
    arena.take(keys, size_t(C::kBlock + C::kKeys) * units);
    arena.take(values, size_t(C::kBlock / C::kPack + 1) * channels);
    arena.take(p, size_t(C::kBlock + C::kKeys) * kSlice);
    arena.take(bias, C::kBlock + C::kKeys);
    arena.take(factor, kSlice);
    arena.take(scores, std::is_same_v<C, Bf16Tiles> ? 2 * C::kKeys * kSlice : 0);
    for (Slice<C>& s : slices) {
      arena.take(s.query, size_t(units) * kSlice);
      arena.take(s.out, channels * kSlice);
      arena.take(s.total, several_groups ? channels * kSlice : 0);
      arena.take(s.max, kSlice);
      arena.take(s.sum, kSlice);
    }
  }
};

template <class S, class C>
class Attention {
 public:
  explicit Attention(const AttentionParams& params) : p(params), d(int(params.d)) {}

  void run(const QueryTile& tile, int64_t h, Scratch<C>& scratch) const {
    const int slices = (tile.count + kSlice - 1) / kSlice;
    for (int s = 0; s < slices; ++s) load_queries(tile, h, s, scratch.slices[s]);
    KeyList list;
    bool first = true;
    auto finish = [&](int group) {
      for (int s = 0; s < slices; ++s) finish_group(tile, s, scratch, group, list.live);
      list.live = false;
    };
    auto attend_list = [&] {
      if (list.count == 0) return;
      const Block<C> block = pack_block(list, scratch);
      for (int s = 0; s < slices; ++s) {
        if (block.biased)
          attend_slice<true>(scratch, s, block, first);
        else
          attend_slice<false>(scratch, s, block, first);
      }
      list.count = 0;
      first = false;
    };
    for (int i = 0; i < p.sources; ++i) {
      const AttentionSource& source = p.source[i];
      if (i > 0 && source.softmax_group != p.source[i - 1].softmax_group) {
        attend_list();
        finish(p.source[i - 1].softmax_group);
        first = true;
      }
      const int64_t row = source.rows ? source.rows[tile.b] : source.r == 1 ? 0 : tile.b;
      if (row < 0) continue;
      const int32_t* index = nullptr;
      int64_t count = source.m;
      if (source.key_index) {
        index = source.key_index + tile.query_class * source.index_stride[0] + row * source.index_stride[1];
        count = source.key_count[tile.query_class * source.count_stride[0] + row * source.count_stride[1]];
      }
      const Logits logits = logits_of(source, tile.b, h);
      if (!(logits == list.logits)) attend_list();
      list.logits = logits;
      for (int64_t k = 0; k < count;) {
        const int n = int(std::min<int64_t>(C::kBlock - list.count, count - k));
        append_keys(source, tile.b, h, row, index, k, n, list, scratch.bias);
        k += n;
        if (list.count == C::kBlock) attend_list();
      }
    }
    attend_list();
    finish(p.softmax_groups - 1);
    for (int s = 0; s < slices; ++s) {
      store_out(tile, h, s, scratch.slices[s]);
      if (scratch.slices[s].beyond) store_wide(tile, h, s, scratch.slices[s].beyond);
    }
  }

 private:
  const AttentionParams& p;
  const int d;

  template <bool kBiased>
  void attend_slice(const Scratch<C>& x, int slice, const Block<C>& block, bool first) const {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<C, Bf16Tiles>)
      return TileBlock(x.slices[slice], block, x.units, d, x.p, x.scores).attend(first);
    else
#endif
      return attend_block<C, kBiased>(x.slices[slice], block, x.units, d, x.p, first);
  }

  int64_t query_at(const QueryTile& tile, int position) const {
    const int64_t i = tile.start + position;
    return p.query_order ? p.query_order[tile.b * p.order_stride + i] : i;
  }

  // Lanes past the end of the tile repeat its last query.
  void load_queries(const QueryTile& tile, int64_t h, int slice, Slice<C>& s) const {
    const S* base = static_cast<const S*>(p.query) + tile.b * p.query_stride[0] + h * p.query_stride[2];
    auto row = [&](int64_t lane) {
      const int position = std::min(slice * kSlice + int(lane), tile.count - 1);
      return base + query_at(tile, position) * p.query_stride[1];
    };
    if constexpr (std::is_same_v<C, Fp32>) {
      rows_to_columns(row, kSlice, d, s.query);
    } else {
      rows_to_columns([&](int64_t lane) { return reinterpret_cast<const Pair*>(row(lane)); }, kSlice, d / 2,
                      reinterpret_cast<float*>(s.query));
      std::fill(s.query + d / 2 * kSlice, s.query + units_of<C>(d) * kSlice, 0);
      if (d % 2)
        for (int lane = 0; lane < kSlice; ++lane) s.query[d / 2 * kSlice + lane] = row(lane)[d - 1].bits;
    }
    if (p.softmax_groups > 1) std::fill_n(s.total, d * kSlice, 0.0f);
    s.beyond = 0;
    start_group(s);
  }

  void start_group(const Slice<C>& s) const {
    std::fill_n(s.out, round_up(d, C::kChannels) * kSlice, 0.0f);
    std::fill_n(s.max, kSlice, -FLT_MAX);
    std::fill_n(s.sum, kSlice, 0.0f);
  }

  // How the scores of a source become logits, in log2 units: score · scale + shift, or + the key's own bias.
  struct Logits {
    float scale, shift;
    bool biased;
    bool operator==(const Logits& other) const {
      return scale == other.scale && biased == other.biased && (biased || shift == other.shift);
    }
  };

  Logits logits_of(const AttentionSource& source, int64_t b, int64_t h) const {
    auto per_head = [&](const float* x, const int64_t (&stride)[2], float otherwise) {
      return x ? x[b * stride[0] + h * stride[1]] : otherwise;
    };
    const float scale = p.scale * per_head(source.logit_scale, source.logit_scale_stride, 1.0f) * kLog2E;
    const float shift = to_log2(per_head(source.logit_bias, source.logit_bias_stride, 0.0f), 0.0f);
    return {scale, shift, source.key_bias || !(scale > 0)};  // unbiased: max and the factor commute
  }

  // A bias in log2 units, plus the shift of its source. What is finite stays finite: a key with a bias of finfo.min has
  // a low weight and is not hidden.
  static float to_log2(float bias, float shift) {
    const float x = bias * kLog2E + shift;
    return std::isfinite(bias) && std::isfinite(shift) ? std::clamp(x, -FLT_MAX, FLT_MAX) : x;
  }

  // The keys of the next block: short sources share one.
  struct KeyList {
    const S *key[C::kBlock], *value[C::kBlock];
    Logits logits{};
    int count = 0;
    bool live = false;  // whether the group has had a key whose bias is not -inf
  };

  // Appends keys k .. k + n of a source's row, for head h.
  void append_keys(const AttentionSource& source, int64_t b, int64_t h, int64_t row, const int32_t* index, int64_t k,
                   int n, KeyList& list, float* biases) const {
    const S* keys = static_cast<const S*>(source.key) + row * source.key_stride[0] + h * source.key_stride[2];
    const S* values = static_cast<const S*>(source.value) + row * source.value_stride[0] + h * source.value_stride[2];
    const int32_t* moved = source.value_index;
    if (moved) moved += row * source.value_index_stride[0] + b * source.value_index_stride[1];
    const float* bias = source.key_bias ? source.key_bias + row * source.bias_stride : nullptr;
    for (int64_t i = k; i < k + n; ++i, ++list.count) {
      const int64_t token = index ? index[i] : i;
      list.key[list.count] = keys + token * source.key_stride[1];
      list.value[list.count] = values + (moved ? moved[token] : token) * source.value_stride[1];
      biases[list.count] = bias ? to_log2(bias[token], list.logits.shift) : list.logits.shift;
      list.live |= biases[list.count] != -INFINITY;
    }
  }

  // The listed keys and values, packed: rows that lie a large power of two apart would meet in a few sets of the L1
  // cache.
  Block<C> pack_block(const KeyList& list, Scratch<C>& scratch) const {
    const int count = list.count, units = scratch.units;
    for (int i = 0; i < count; ++i) pack_row<S, C>(list.key[i], d, scratch.keys + int64_t(i) * units);
    std::fill_n(scratch.keys + int64_t(count) * units, (round_up(count, C::kKeys) - count) * units, 0);
    std::fill(scratch.bias + count, scratch.bias + C::kBlock + C::kKeys, -INFINITY);
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<C, Bf16Tiles>) {
      for (int i = 0; i < count; i += C::kKeys)
        transpose_values([&](int j) { return reinterpret_cast<const uint16_t*>(list.value[i + j]); },
                         std::min(count - i, C::kKeys), d, scratch.values + i / 2);
    }
#endif
    if constexpr (!std::is_same_v<C, Bf16Tiles>) {
      for (int i = 0; i < count; i += C::kPack)
        pack_values<S, C>(list.value[i], i + 1 < count ? list.value[i + 1] : nullptr, d,
                          scratch.values + int64_t(i / C::kPack) * d);
    }
    return {reinterpret_cast<const char*>(scratch.keys),
            scratch.values,
            scratch.bias,
            count,
            list.logits.biased,
            list.logits.scale,
            list.logits.shift};
  }

  // Divides by the sum and multiplies by the group's weight; where several groups are added, into total. Notes the
  // queries that fp32 could not hold; `live`: whether the group has a key that is not hidden by its bias.
  void finish_group(const QueryTile& tile, int slice, Scratch<C>& scratch, int group, bool live) const {
    Slice<C>& s = scratch.slices[slice];
    float* factor = scratch.factor;
    for (int lane = 0; lane < kSlice; ++lane) factor[lane] = s.sum[lane] == 0 ? 0.0f : 1.0f / s.sum[lane];
    if (const float* weight = p.weight[group]) {
      const int64_t* stride = p.weight_stride[group];
      const int lanes = std::min(kSlice, tile.count - slice * kSlice);
      for (int lane = 0; lane < lanes; ++lane)
        factor[lane] *= weight[tile.b * stride[0] + query_at(tile, slice * kSlice + lane) * stride[1]];
    }
    const bool several = p.softmax_groups > 1;
    Vec odd[2] = {};  // 0, or NaN in the lanes of results that are not finite
    for (int i = 0; i < d * kSlice; i += kSlice) {
      for (int j = i; j < i + kSlice; j += kLanes) {
        const Vec x = load(s.out + j) * load(factor + (j - i));
        odd[j > i] += x * 0.0f;
        if (several)
          store(s.total + j, load(s.total + j) + x);
        else
          store(s.out + j, x);
      }
    }
    for (int lane = 0; live && lane < kSlice; ++lane)
      if (odd[lane / kLanes][lane % kLanes] != 0 || s.sum[lane] == 0 || std::fabs(s.max[lane]) > kFar)
        s.beyond |= 1u << lane;
    if (several && group + 1 < p.softmax_groups) start_group(s);
  }

  void store_out(const QueryTile& tile, int64_t h, int slice, const Slice<C>& s) const {
    const int lanes = std::min(kSlice, tile.count - slice * kSlice);
    const float* result = p.softmax_groups > 1 ? s.total : s.out;
    S* out = static_cast<S*>(p.out) + tile.b * p.out_stride[0] + h * p.out_stride[2];
    auto row = [&](int64_t lane) { return out + query_at(tile, slice * kSlice + int(lane)) * p.out_stride[1]; };
    columns_to_rows(result, kSlice, lanes, d, row);
    if (!p.lse) return;
    for (int lane = 0; lane < lanes; ++lane) {
      const double lse = s.sum[lane] == 0 ? -INFINITY : s.max[lane] * kLn2 + std::log(double(s.sum[lane]));
      store_lse(tile.b, query_at(tile, slice * kSlice + lane), h, lse);
    }
  }

  void store_lse(int64_t b, int64_t i, int64_t h, double lse) const {
    const int64_t at = b * p.lse_stride[0] + i * p.lse_stride[1] + h * p.lse_stride[2];
    if (p.lse_is_double)
      static_cast<double*>(p.lse)[at] = lse;
    else
      static_cast<float*>(p.lse)[at] = finite_float(lse);
  }

  // The queries of a slice whose bits are set, computed anew in double.
  void store_wide(const QueryTile& tile, int64_t h, int slice, uint32_t lanes) const {
    const S* query = static_cast<const S*>(p.query) + tile.b * p.query_stride[0] + h * p.query_stride[2];
    S* out = static_cast<S*>(p.out) + tile.b * p.out_stride[0] + h * p.out_stride[2];
    double result[kMaxHeadDim];
    for (int position = slice * kSlice; lanes && position < tile.count; ++position, lanes >>= 1) {
      if (!(lanes & 1)) continue;
      const int64_t i = query_at(tile, position);
      auto weight_at = [&](int group) {
        const float* weight = p.weight[group];
        const int64_t* stride = p.weight_stride[group];
        return weight ? double(weight[tile.b * stride[0] + i * stride[1]]) : 1.0;
      };
      WideQuery<S> wide(p, tile.b, h, tile.query_class, query + i * p.query_stride[1]);
      const double lse = wide.attend(weight_at, result);
      for (int c = 0; c < d; ++c) from_float(static_cast<float>(result[c]), out[i * p.out_stride[1] + c]);
      if (p.lse) store_lse(tile.b, i, h, lse);
    }
  }
};

// ---- all tiles, over threads ----

std::vector<QueryTile> make_tiles(const AttentionParams& p, int slices) {
  std::vector<QueryTile> tiles;
  const int64_t step = int64_t(slices) * kSlice;
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t c = 0; c < p.c; ++c) {
      const int32_t* start = p.class_start ? p.class_start + b * p.class_stride + c : nullptr;
      const int64_t begin = start ? start[0] : 0, end = start ? start[1] : p.n;
      for (int64_t i = begin; i < end; i += step) tiles.push_back({b, c, i, int(std::min(step, end - i))});
    }
  return tiles;
}

template <class S, class C>
void attend(const AttentionParams& p, const Parallel& parallel) {
  int64_t keys = 0;
  for (int i = 0; i < p.sources; ++i) keys += p.source[i].m;
  const bool tiny = p.b * p.n * p.h * p.d * keys < (1 << 18);  // a second thread would cost more than it brings
  const int threads = tiny ? 1 : parallel.threads;
  int slices = std::clamp<int>(kTileBytes / Scratch<C>::slice_bytes(int(p.d), p.softmax_groups > 1), 1, kMaxSlices);
  while (slices > 4 && p.b * p.h * ((p.n + slices * kSlice - 1) / (slices * kSlice)) < 4 * threads) slices /= 2;
  slices = std::min<int>(slices, int((p.n + kSlice - 1) / kSlice));

  const std::vector<QueryTile> tiles = make_tiles(p, slices);
  struct Job {
    const AttentionParams& p;
    const std::vector<QueryTile>& tiles;
    int slices;
    std::atomic<int64_t> next{0};
  } job{p, tiles, slices};
  auto worker = [](void* context, int64_t) {
    Job& job = *static_cast<Job*>(context);
#if defined(__AMX_BF16__)
    const TileSession tiles;
#endif
    Scratch<C> scratch(int(job.p.d), job.slices, job.p.softmax_groups > 1);
    const Attention<S, C> attention(job.p);
    const int64_t items = int64_t(job.tiles.size()) * job.p.h;
    // Tiles of one batch row and head follow each other: its keys stay in cache.
    const int64_t per_head = int64_t(job.tiles.size());
    for (int64_t i; (i = job.next.fetch_add(1)) < items;) attention.run(job.tiles[i % per_head], i / per_head, scratch);
  };
  if (threads == 1)
    worker(&job, 0);
  else
    parallel.run(threads, worker, &job);
}

}  // namespace

void attention_kernel(const AttentionParams& p, const Parallel& parallel) {
  if (p.b == 0 || p.n == 0 || p.h == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return attend<float, Fp32>(p, parallel);
    case DType::kFloat16:
      return attend<Float16, Fp32>(p, parallel);
    case DType::kBFloat16:
#if defined(__AMX_BF16__)
      return attend<BFloat16, Bf16Tiles>(p, parallel);
#else
      return attend<BFloat16, std::conditional_t<LR_HAS_BF16_DOT != 0, Bf16Pairs, Fp32>>(p, parallel);
#endif
  }
}

}  // namespace lr::LR_ISA
