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
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/attention_block.h"
#include "cpu/attention_sources.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_wide.h"
#include "cpu/launch.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"
#include "params.h"

namespace lr::LR_ISA {
namespace {

constexpr int kMaxSlices = 32;  // slices in a tile
// Of queries and outputs in a tile, which share the L2 cache with a block. Processors with AMX have 2 MiB of it; of a
// thread the scratch is 1 MiB at most.
#if defined(__AMX_BF16__)
constexpr size_t kTileBytes = 688 << 10;
#else
constexpr size_t kTileBytes = 384 << 10;
#endif
constexpr double kLn2 = 0.693147180559945309417;
constexpr float kFar = 0x1p120f;  // logits beyond this, in log2 units, come near fp32's end

// ---- packing ----

template <class C>
int units_of(int d) {
  return int(round_up((d + C::kPack - 1) / C::kPack, C::kUnits));
}

// Row-wise copy into units: fp32 values, or the 16-bit elements themselves, zeros after the last.
template <class S, class C>
LR_INLINE void pack_row(const StoredRow& row, int d, [[maybe_unused]] S* room, typename C::Unit* to) {
  if constexpr (std::is_same_v<C, Fp32>) {
    to_floats(elements_of(row, d, room), d, to);
  } else {
    for (int u = d / 2; u < units_of<C>(d); ++u) to[u] = 0;
    const S* from = elements_of(row, d, reinterpret_cast<S*>(to));
    if (row.storage == Storage::kElements) std::memcpy(to, from, d * sizeof(S));
  }
}

// A row of values: fp32, or pairs of two keys per channel. `odd` is null after the last of an odd number of keys.
template <class S, class C>
LR_INLINE void pack_values(const S* even, [[maybe_unused]] const S* odd, int d, typename C::Unit* to) {
  if constexpr (std::is_same_v<C, Fp32>) {
    to_floats(even, d, to);
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

// Scratch of one thread, laid out for the head_dims d of queries and keys and e of values.
template <class S, class C>
struct Scratch {
  std::vector<Slice<C>> slices;
  typename C::Unit *keys, *values, *p;
  float *bias, *factor, *scores;
  int32_t* ranges;  // see TileRanges
  S* room;          // for the 8-bit rows that are read together, as elements
  int units, row;   // row: elements from one row of the room to the next

  static size_t slice_bytes(int d, int e, bool several_groups) {
    const size_t channels = round_up(e, C::kChannels), rows = (several_groups ? 2 * channels : channels) + 4;
    return units_of<C>(d) * kSlice * sizeof(typename C::Unit) + rows * kSlice * sizeof(float);
  }

  Scratch(int d, int e, int count, bool several_groups)
      : slices(count), units(units_of<C>(d)), row(int(round_up(std::max(d, e), kLanes))) {
    lay_out(
        [&](Arena& arena) {
          const size_t channels = round_up(e, C::kChannels);
          arena.take(keys, size_t(C::kBlock + C::kKeys) * units);
          arena.take(values, size_t(C::kBlock / C::kPack + 1) * channels);
          arena.take(p, size_t(C::kBlock + C::kKeys) * kSlice);
          arena.take(bias, C::kBlock + C::kKeys);
          arena.take(factor, kSlice);
          arena.take(scores, std::is_same_v<C, Bf16Tiles> ? 2 * C::kKeys * kSlice : 0);
          arena.take(ranges, TileRanges::kRoom * slices.size());
          arena.take(room, size_t(std::is_same_v<C, Bf16Tiles> ? C::kKeys : C::kPack) * row);
          for (Slice<C>& s : slices) {
            arena.take(s.query, size_t(units) * kSlice);
            arena.take(s.out, channels * kSlice);
            arena.take(s.total, several_groups ? channels * kSlice : 0);
            arena.take(s.max, kSlice);
            arena.take(s.sum, kSlice);
          }
        },
        thread_buffer);
  }
};

template <class S, class C>
class Attention {
 public:
  explicit Attention(const AttentionParams& params) : p(params), d(int(params.d)), e(int(params.e)) {}

  void run(const QueryTile& tile, Scratch<S, C>& scratch) const {
    const int slices = tile.slices();
    for (int s = 0; s < slices; ++s) load_queries(tile, s, scratch.slices[s]);
    KeyList list;
    TileRanges ranges(scratch.ranges, slices);
    auto finish = [&](int group) {
      for (int s = 0; s < slices; ++s) finish_group(tile, s, scratch, group, list.live);
      list.live = false;
    };
    auto attend_list = [&] {
      if (list.count == 0) return;
      const Block<C> block = pack_block(list, scratch);
      for (int s = 0; s < slices; ++s) {
        if (list.ranged)
          attend_range(scratch, s, block, ranges, list.start);
        else
          attend_slice(scratch, s, block);
      }
      list.start += list.count;
      list.count = 0;
    };
    for (int i = 0; i < p.sources; ++i) {
      const AttentionSource& source = p.source[i];
      if (i > 0 && source.softmax_group != p.source[i - 1].softmax_group) {
        attend_list();
        finish(p.source[i - 1].softmax_group);
      }
      const VisibleKeys<S> keys(source, tile);
      if (keys.row < 0) continue;
      const Logits logits = logits_of(keys);
      if (!(logits == list.logits) || list.ranged || source.key_range) attend_list();
      list.logits = logits;
      list.ranged = source.key_range != nullptr;
      Places seen{0, keys.count};
      if (list.ranged) {  // such a source shares no block with others
        ranges.read(p, tile, source, keys);
        seen = ranges.hull(0, slices);
        list.start = seen.first;
      }
      for (int64_t k = seen.first; k < seen.last;) {
        const int n = int(std::min<int64_t>(C::kBlock - list.count, seen.last - k));
        append_keys(keys, k, n, list, scratch.bias);
        k += n;
        if (list.count == C::kBlock) attend_list();
      }
    }
    attend_list();
    finish(p.softmax_groups - 1);
    for (int s = 0; s < slices; ++s) {
      store_out(tile, s, scratch.slices[s]);
      if (scratch.slices[s].beyond) store_wide(tile, s, scratch.slices[s].beyond);
    }
  }

 private:
  const AttentionParams& p;
  const int d, e;

  void attend_slice(Scratch<S, C>& x, int slice, const Block<C>& block) const {
    Slice<C>& s = x.slices[slice];
    const bool first = !s.started;
    s.started = true;
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<C, Bf16Tiles>) TileBlock(s, block, x.units, e, x.p, x.scores).attend(first);
#endif
    if constexpr (!std::is_same_v<C, Bf16Tiles>) {
      if (block.biased)
        attend_block<C, true>(s, block, x.units, e, x.p, first);
      else
        attend_block<C, false>(s, block, x.units, e, x.p, first);
    }
  }

  // The part of a block that the queries of a slice see. start: the place of the block's first key.
  void attend_range(Scratch<S, C>& x, int slice, Block<C> block, const TileRanges& ranges, int64_t start) const {
    const Places seen = ranges.hull(slice, 1).within({start, start + block.keys_count});
    if (seen.empty()) return;
    const int first = int(seen.first - start) / C::kKeys * C::kKeys, last = int(seen.last - start);
    const bool padded = last < block.keys_count && last % C::kKeys;  // with keys in place of zeros
    block.keys += int64_t(first) * x.units * sizeof(typename C::Unit);
    block.values += std::is_same_v<C, Bf16Tiles> ? first / C::kPack : first / C::kPack * e;
    block.bias += first;
    block.keys_count = last - first;
    alignas(64) float from[kSlice], to[kSlice];
    if (padded || !ranges.whole(slice, {start + first, start + last}))
      block.seen = ranges.lanes(slice, start + first, block.keys_count, from, to);
    attend_slice(x, slice, block);
  }

  // Lanes past the end of the tile repeat its last query.
  void load_queries(const QueryTile& tile, int slice, Slice<C>& s) const {
    const TileRows<const S> queries(p, tile, static_cast<const S*>(p.query), p.query_stride);
    auto row = [&](int64_t lane) { return queries(std::min(slice * kSlice + int(lane), tile.count - 1)); };
    if constexpr (std::is_same_v<C, Fp32>) {
      rows_to_columns(row, kSlice, d, s.query);
    } else {
      rows_to_columns([&](int64_t lane) { return reinterpret_cast<const Pair*>(row(lane)); }, kSlice, d / 2,
                      reinterpret_cast<float*>(s.query));
      std::fill(s.query + d / 2 * kSlice, s.query + units_of<C>(d) * kSlice, 0);
      if (d % 2)
        for (int lane = 0; lane < kSlice; ++lane) s.query[d / 2 * kSlice + lane] = row(lane)[d - 1].bits;
    }
    if (p.softmax_groups > 1) std::fill_n(s.total, e * kSlice, 0.0f);
    s.beyond = 0;
    start_group(s);
  }

  void start_group(Slice<C>& s) const {
    s.started = false;
    std::fill_n(s.out, round_up(e, C::kChannels) * kSlice, 0.0f);
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

  Logits logits_of(const VisibleKeys<S>& keys) const {
    const float scale = p.scale * keys.logit_scale * kLog2E;
    return {scale, keys.shift, keys.bias || !(scale > 0)};  // unbiased: max and the factor commute
  }

  // The keys of the next block: short sources share one.
  struct KeyList {
    StoredRow key[C::kBlock], value[C::kBlock];
    Logits logits{};
    int count = 0;
    bool live = false;    // whether the group has had a key whose bias is not -inf
    bool ranged = false;  // whether its source has a key_range
    int64_t start = 0;    // then: the place of the first key
  };

  // Appends the visible keys k .. k + n of a source.
  static void append_keys(const VisibleKeys<S>& keys, int64_t k, int n, KeyList& list, float* biases) {
    for (int64_t i = k; i < k + n; ++i, ++list.count) {
      const int64_t token = keys.token(i);
      list.key[list.count] = keys.stored_key(token);
      list.value[list.count] = keys.stored_value(token);
      biases[list.count] = keys.log2_bias_of(token);
      list.live |= biases[list.count] != -INFINITY;
    }
  }

  // The listed keys and values, packed: rows that lie a large power of two apart would meet in a few sets of the L1
  // cache.
  Block<C> pack_block(const KeyList& list, Scratch<S, C>& scratch) const {
    const int count = list.count, units = scratch.units;
    for (int i = 0; i < count; ++i) pack_row<S, C>(list.key[i], d, scratch.room, scratch.keys + int64_t(i) * units);
    std::fill_n(scratch.keys + int64_t(count) * units, (round_up(count, C::kKeys) - count) * units, 0);
    std::fill(scratch.bias + count, scratch.bias + C::kBlock + C::kKeys, -INFINITY);
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<C, Bf16Tiles>) {
      const S* row[C::kKeys];
      for (int i = 0; i < count; i += C::kKeys) {
        const int keys = std::min(count - i, C::kKeys);
        for (int j = 0; j < keys; ++j) row[j] = elements_of(list.value[i + j], e, scratch.room + j * scratch.row);
        transpose_values([&](int j) { return reinterpret_cast<const uint16_t*>(row[j]); }, keys, e,
                         scratch.values + i / 2);
      }
    }
#endif
    if constexpr (!std::is_same_v<C, Bf16Tiles>) {
      for (int i = 0; i < count; i += C::kPack) {
        const S* even = elements_of(list.value[i], e, scratch.room);
        const S* odd =
            C::kPack == 1 || i + 1 == count ? nullptr : elements_of(list.value[i + 1], e, scratch.room + scratch.row);
        pack_values<S, C>(even, odd, e, scratch.values + int64_t(i / C::kPack) * e);
      }
    }
    return {reinterpret_cast<const char*>(scratch.keys),
            scratch.values,
            scratch.bias,
            count,
            list.logits.biased,
            list.logits.scale,
            list.logits.shift,
            {}};
  }

  // Divides a slice's output by its sum and multiplies it by the weight of the softmax group. Where there are several
  // softmax groups, the product is added to `total`. Notes the queries whose results fp32 could not hold; `live` says
  // whether the softmax group has a key that its bias does not hide.
  void finish_group(const QueryTile& tile, int slice, Scratch<S, C>& scratch, int group, bool live) const {
    Slice<C>& s = scratch.slices[slice];
    float* factor = scratch.factor;
    for (int lane = 0; lane < kSlice; ++lane) factor[lane] = s.sum[lane] == 0 ? 0.0f : 1.0f / s.sum[lane];
    const int first = slice * kSlice, lanes = std::min(kSlice, tile.count - first);
    for (int lane = 0; p.weight[group] && lane < lanes; ++lane) factor[lane] *= weight_at(tile, group, first + lane);
    const bool several = p.softmax_groups > 1;
    Vec odd[2] = {};  // 0, or NaN in the lanes of results that are not finite
    for (int i = 0; i < e * kSlice; i += kSlice) {
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

  // The weight of a query in a softmax group that has weights.
  float weight_at(const QueryTile& tile, int group, int position) const {
    const int64_t* stride = p.weight_stride[group];
    return *TileRows<const float>(p, tile, p.weight[group], {stride[0], stride[1], 0})(position);
  }

  void store_out(const QueryTile& tile, int slice, const Slice<C>& s) const {
    const int first = slice * kSlice, lanes = std::min(kSlice, tile.count - first);
    const TileRows<S> out(p, tile, static_cast<S*>(p.out), p.out_stride);
    columns_to_rows(p.softmax_groups > 1 ? s.total : s.out, kSlice, lanes, e,
                    [&](int64_t lane) { return out(first + lane); });
    for (int lane = 0; p.lse && lane < lanes; ++lane)
      store_lse(tile, first + lane, s.sum[lane] == 0 ? -INFINITY : s.max[lane] * kLn2 + std::log(double(s.sum[lane])));
  }

  void store_lse(const QueryTile& tile, int position, double lse) const {
    if (p.lse_is_double)
      *TileRows<double>(p, tile, static_cast<double*>(p.lse), p.lse_stride)(position) = lse;
    else
      *TileRows<float>(p, tile, static_cast<float*>(p.lse), p.lse_stride)(position) = finite_float(lse);
  }

  // The queries of a slice whose bits are set, computed anew in double.
  void store_wide(const QueryTile& tile, int slice, uint32_t lanes) const {
    const TileRows<const S> queries(p, tile, static_cast<const S*>(p.query), p.query_stride);
    const TileRows<S> out(p, tile, static_cast<S*>(p.out), p.out_stride);
    double result[kMaxHeadDim];
    for (int position = slice * kSlice; lanes && position < tile.count; ++position, lanes >>= 1) {
      if (!(lanes & 1)) continue;
      auto weight_of = [&](int group) { return p.weight[group] ? double(weight_at(tile, group, position)) : 1.0; };
      const double lse = WideQuery<S>(p, tile, position, queries(position)).attend(weight_of, result);
      for (int c = 0; c < e; ++c) from_float(static_cast<float>(result[c]), out(position)[c]);
      if (p.lse) store_lse(tile, position, lse);
    }
  }
};

// ---- all tiles, over threads ----

#if defined(__AMX_BF16__)
using Bf16Products = Bf16Tiles;
#else
using Bf16Products = std::conditional_t<LR_HAS_BF16_DOT != 0, Bf16Pairs, Fp32>;
#endif
template <class S>
using ProductsOf = std::conditional_t<std::is_same_v<S, BFloat16>, Bf16Products, Fp32>;

template <class S>
void attend(const AttentionParams& p, const Parallel& parallel) {
  using C = ProductsOf<S>;
  int64_t keys = 0;
  for (int i = 0; i < p.sources; ++i) keys += p.source[i].m;
  // a second thread would cost more than it brings
  const bool tiny = p.b * p.n * p.h * std::max(p.d, p.e) * keys < (1 << 18);
  const int threads = tiny ? 1 : parallel.threads;
  const size_t slice_bytes = Scratch<S, C>::slice_bytes(int(p.d), int(p.e), p.softmax_groups > 1);
  int slices = std::clamp<int>(kTileBytes / slice_bytes, 1, kMaxSlices);
  // Four tiles per thread or more balance the load; tiles below four slices would pack each block for too few queries.
  while (slices > 4 && p.b * p.h * ((p.n + slices * kSlice - 1) / (slices * kSlice)) < 4 * threads) slices /= 2;
  // All tiles as large as the largest may be small: each costs a packing of all keys.
  const int all = int((p.n + kSlice - 1) / kSlice), tiles = (all + slices - 1) / slices;
  slices = (all + tiles - 1) / tiles;

  struct Job {
    const AttentionParams& p;
    int slices;
    std::vector<QueryTile> tiles;  // of head 0; the other heads have the same
    std::atomic<int64_t> next{0};
  } job{p, slices, {}};
  for (int64_t b = 0; b < p.b; ++b)
    each_tile(p, b, 0, slices * kSlice, [&](const QueryTile& tile) { job.tiles.push_back(tile); });
  auto worker = [](void* context, int64_t) {
    Job& job = *static_cast<Job*>(context);
#if defined(__AMX_BF16__)
    std::optional<TileSession> session;
    if (std::is_same_v<C, Bf16Tiles>) session.emplace();
#endif
    Scratch<S, C> scratch(int(job.p.d), int(job.p.e), job.slices, job.p.softmax_groups > 1);
    const Attention<S, C> attention(job.p);
    // Tiles of one batch row and head follow each other: its keys stay in cache. The last comes first, since under
    // causal order it takes longest, and threads that end on short tiles end together.
    const int64_t per_head = int64_t(job.tiles.size());
    for (int64_t i; (i = job.next.fetch_add(1)) < per_head * job.p.h;) {
      QueryTile tile = job.tiles[per_head - 1 - i % per_head];
      tile.h = i / per_head;
      attention.run(tile, scratch);
    }
  };
  run_items(parallel, threads, tiny, worker, &job);
}

}  // namespace

void attention_kernel(const AttentionParams& p, const Parallel& parallel) {
  if (p.b == 0 || p.n == 0 || p.h == 0) return;
  with_element(p.dtype, [&](auto x) { attend<decltype(x)>(p, parallel); });
}

}  // namespace lr::LR_ISA
