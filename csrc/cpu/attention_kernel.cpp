// multi_source_attention forward, compiled once per instruction set.
//
// Queries sit in SIMD lanes: a slice is 2 vectors of queries, its scores and its output are held transposed (one row per
// key or channel, one column per query), so max and sum are vertical and no lane is lost at any head_dim. One thread takes
// a tile of queries of one batch row, head and class, and walks the visible keys of all sources in blocks; a block is
// gathered and packed once and used by all slices of the tile. Nothing of size N x M is ever stored.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"
#include "params.h"

namespace lr::LR_ISA {

void attention_kernel(const AttentionParams& p, const Parallel& parallel);

namespace {

constexpr int kSlice = 2 * kLanes;  // queries in a slice
constexpr int kBlock = 192;         // keys in a block
constexpr int kMaxSlices = 32;      // slices in a tile
constexpr size_t kTileBytes = 384 << 10;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;
// Keys per score tile and channels per value tile: accumulators that fit the registers (32 with AVX-512 and NEON, 16 AVX2).
#if defined(__AVX512F__)
constexpr int kKeyTile = 8, kChannelTile = 10;
#elif defined(__AVX2__)
constexpr int kKeyTile = 6, kChannelTile = 6;
#else
constexpr int kKeyTile = 8, kChannelTile = 8;
#endif

// How the products are computed: fp32, or bf16 pairs along the summed dimension. `Unit` is what one lane multiplies.
struct Fp32 {
  using Unit = float;
  static constexpr int kPack = 1;
};
struct Bf16Pairs {
  using Unit = uint32_t;
  static constexpr int kPack = 2;
};

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- products of one tile ----

// scores[i] = <key i, query lane> for kKeyTile keys. queries: units x kSlice.
template <class C>
LR_INLINE void score_tile(const char* keys, int64_t key_bytes, const typename C::Unit* queries, int units,
                          Vec (&scores)[kKeyTile][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeyTile; ++i) scores[i][0] = scores[i][1] = Vec{};
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

// out[c] += Σ_keys value[key][c] · p[key] for kCount channels. Each block's sum starts at zero: 5 times less fp32 error.
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
void add_values(const typename C::Unit* values, int64_t value_stride, const typename C::Unit* p, int units, int d,
                float* out) {
  int c = 0;
  for (; c + kTile <= d; c += kTile) value_tile<C, kTile>(values + c, value_stride, p, units, out + c * kSlice);
  value_remainder<C, kTile - 1>(d - c, values + c, value_stride, p, units, out + c * kSlice);
}

// ---- one block of keys for one slice of queries ----

// A packed block: keys as rows of units, values as rows of units (a row holds kPack keys).
template <class C>
struct Block {
  const char* keys;               // keys x units, row after key_bytes
  const char* tail;               // kKeyTile x units: the last, partial key tile, padded with zeros
  const typename C::Unit* values;  // [keys / kPack, d], row after value_stride units
  const float* bias;              // [keys], padded with -inf to whole key tiles, log2 units; or null: none
  int64_t key_bytes, tail_bytes, value_stride;
  int keys_count;
  float scale;  // logit factor in log2 units; > 0 where bias is null
  float shift;  // added to the logits, log2 units; part of bias where that is given
};

template <class C>
struct Slice {
  typename C::Unit* query;  // [units, kSlice]
  float* out;               // [d, kSlice], not yet divided by sum
  float* max;               // [kSlice] log2 units
  float* sum;               // [kSlice] Σ 2^(logit - max)
};

template <class C, bool kBiased>
LR_INLINE void tile_logits(const Block<C>& block, int tile, const typename C::Unit* query, int units,
                           Vec (&x)[kKeyTile][2]) {
  const int rest = block.keys_count - tile * kKeyTile;
  const bool partial = __builtin_expect(rest < kKeyTile, 0);
  score_tile<C>(partial ? block.tail : block.keys + tile * kKeyTile * block.key_bytes,
                partial ? block.tail_bytes : block.key_bytes, query, units, x);
  if constexpr (kBiased) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeyTile; ++i) {
      const Vec bias = set1(block.bias[tile * kKeyTile + i]);
      x[i][0] = x[i][0] * block.scale + bias;
      x[i][1] = x[i][1] * block.scale + bias;
    }
  } else if (partial) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeyTile; ++i)
      if (i >= rest) x[i][0] = x[i][1] = set1(-INFINITY);
  }
}

// Softmax weights of one block into p, and their products with the values into the slice. The running maximum is lazy: it
// is taken from the first tile that the slice sees, and the block is redone only where a logit exceeds it by 2^60.
// Unbiased logits keep their factor out of the scores until the exponent: 2^(scale·s + shift - max) is one fma.
template <class C, bool kBiased>
void attend_block(const Slice<C>& s, const Block<C>& block, int units, int d, typename C::Unit* p, bool first) {
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
    Vec sum0 = Vec{}, sum1 = Vec{}, top0 = set1(-INFINITY), top1 = top0;
    const Vec z0 = shift - m0, z1 = shift - m1;
    for (int t = 0; t < tiles; ++t) {
      Vec x[kKeyTile][2];
      tile_logits<C, kBiased>(block, t, s.query, units, x);
      typename C::Unit* row = p + t * (kKeyTile / C::kPack) * kSlice;
      if constexpr (std::is_same_v<C, Fp32>) {
#pragma GCC unroll 16
        for (int i = 0; i < kKeyTile; ++i) {
          top0 = max(top0, x[i][0]);
          top1 = max(top1, x[i][1]);
          const Vec e0 = exp2<5>(x[i][0] * scale + z0), e1 = exp2<5>(x[i][1] * scale + z1);
          sum0 += e0;
          sum1 += e1;
          store(row + i * kSlice, e0);
          store(row + i * kSlice + kLanes, e1);
        }
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
    if (!first) {
      const Vec f0 = exp2<5>(m0 - n0), f1 = exp2<5>(m1 - n1);
      store(s.sum, load(s.sum) * f0);
      store(s.sum + kLanes, load(s.sum + kLanes) * f1);
      for (int c = 0; c < d; ++c) {
        store(s.out + c * kSlice, load(s.out + c * kSlice) * f0);
        store(s.out + c * kSlice + kLanes, load(s.out + c * kSlice + kLanes) * f1);
      }
    }
    m0 = n0;
    m1 = n1;
  }
  // A channel tile that divides d leaves no remainder; 8 does for most head dims where kChannelTile does not.
  const int key_units = (block.keys_count + C::kPack - 1) / C::kPack;
  if (kChannelTile > 8 && d % kChannelTile != 0 && d % 8 == 0)
    add_values<C, 8>(block.values, block.value_stride, p, key_units, d, s.out);
  else
    add_values<C, kChannelTile>(block.values, block.value_stride, p, key_units, d, s.out);
}

// ---- packing ----

template <class S>
LR_INLINE uint16_t bits_of(S x) {
  return x.bits;
}

// Row-wise copy into units: fp32 values, or the 16-bit elements themselves with one zero after an odd d.
template <class S, class C>
LR_INLINE void pack_row(const S* from, int d, typename C::Unit* to) {
  if constexpr (std::is_same_v<C, Fp32>) {
    for (int c = 0; c < d; ++c) to[c] = to_float(from[c]);
  } else {
    if (d % 2) to[d / 2] = 0;
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

// ---- one tile of queries ----

struct QueryTile {
  int64_t b, query_class, start;  // start: position in query_order
  int count;
};

// Scratch of one thread, laid out for a head_dim.
template <class C>
struct Scratch {
  std::vector<Slice<C>> slices;
  typename C::Unit *keys, *tail, *values, *p;
  float *bias, *inverse;
  int units;

  static size_t slice_bytes(int d) {
    return round_up(d, C::kPack) / C::kPack * kSlice * sizeof(typename C::Unit) + (d + 2) * kSlice * sizeof(float);
  }

  Scratch(int d, int count) : slices(count), units((d + C::kPack - 1) / C::kPack) {
    const size_t key_rows = size_t(kBlock + kKeyTile) * units, p_rows = size_t(kBlock + kKeyTile) * kSlice;
    size_t need = 0;
    auto layout = [&](auto*& pointer, size_t elements) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(need);
      need += round_up(elements * sizeof(*pointer), 64);
    };
    layout(keys, key_rows);
    layout(tail, size_t(kKeyTile) * units);
    layout(values, size_t(kBlock / C::kPack + 1) * d);
    layout(p, p_rows);
    layout(bias, kBlock + kKeyTile);
    layout(inverse, kSlice);
    for (Slice<C>& s : slices) {
      layout(s.query, size_t(units) * kSlice);
      layout(s.out, size_t(d) * kSlice);
      layout(s.max, kSlice);
      layout(s.sum, kSlice);
    }
    char* base = reserve(need);
    auto place = [&](auto*& pointer) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + reinterpret_cast<size_t>(pointer));
    };
    place(keys), place(tail), place(values), place(p), place(bias), place(inverse);
    for (Slice<C>& s : slices) place(s.query), place(s.out), place(s.max), place(s.sum);
  }

  // The thread's buffer, kept between calls: a fresh one would cost its page faults every time.
  static char* reserve(size_t bytes) {
    struct Free {
      void operator()(char* x) const { std::free(x); }
    };
    static thread_local std::unique_ptr<char, Free> buffer;
    static thread_local size_t capacity = 0;
    if (capacity < bytes) {
      capacity = round_up(bytes, 4096);
      buffer.reset(static_cast<char*>(std::aligned_alloc(4096, capacity)));
    }
    return buffer.get();
  }
};

template <class S, class C>
class Attention {
 public:
  explicit Attention(const AttentionParams& params) : p(params), d(int(params.d)) {}

  void run(const QueryTile& tile, int64_t h, Scratch<C>& scratch) const {
    const int slices = (tile.count + kSlice - 1) / kSlice;
    for (int s = 0; s < slices; ++s) load_queries(tile, h, s, scratch.slices[s]);
    bool first = true;
    for (int i = 0; i < p.sources; ++i) {
      const AttentionSource& source = p.source[i];
      const int64_t row = source.rows ? source.rows[tile.b] : source.r == 1 ? 0 : tile.b;
      if (row < 0) continue;
      const int32_t* index = nullptr;
      int64_t count = source.m;
      if (source.key_index) {
        index = source.key_index + tile.query_class * source.index_stride[0] + row * source.index_stride[1];
        count = source.key_count[tile.query_class * source.count_stride[0] + row * source.count_stride[1]];
      }
      for (int64_t k = 0; k < count; k += kBlock) {
        const Block<C> block = load_block(source, tile.b, h, row, index, k, int(std::min<int64_t>(kBlock, count - k)), scratch);
        for (int s = 0; s < slices; ++s) {
          if (block.bias)
            attend_block<C, true>(scratch.slices[s], block, scratch.units, d, scratch.p, first);
          else
            attend_block<C, false>(scratch.slices[s], block, scratch.units, d, scratch.p, first);
        }
        first = false;
      }
    }
    for (int s = 0; s < slices; ++s) store_out(tile, h, s, scratch.slices[s], scratch.inverse);
  }

 private:
  const AttentionParams& p;
  const int d;

  int64_t query_at(const QueryTile& tile, int position) const {
    const int64_t i = tile.start + position;
    return p.query_order ? p.query_order[tile.b * p.order_stride + i] : i;
  }

  void load_queries(const QueryTile& tile, int64_t h, int slice, const Slice<C>& s) const {
    const S* base = static_cast<const S*>(p.query) + tile.b * p.query_stride[0] + h * p.query_stride[2];
    const int units = (d + C::kPack - 1) / C::kPack;
    for (int lane = 0; lane < kSlice; ++lane) {
      const int position = slice * kSlice + lane;
      if (position >= tile.count) {
        for (int u = 0; u < units; ++u) s.query[u * kSlice + lane] = 0;
        continue;
      }
      const S* row = base + query_at(tile, position) * p.query_stride[1];
      if constexpr (std::is_same_v<C, Fp32>) {
        for (int c = 0; c < d; ++c) s.query[c * kSlice + lane] = to_float(row[c]);
      } else {
        for (int u = 0; u < d / 2; ++u) std::memcpy(&s.query[u * kSlice + lane], row + 2 * u, 4);
        if (d % 2) s.query[d / 2 * kSlice + lane] = row[d - 1].bits;
      }
    }
    std::fill_n(s.out, d * kSlice, 0.0f);
    std::fill_n(s.max, kSlice, -FLT_MAX);
    std::fill_n(s.sum, kSlice, 0.0f);
  }

  // Keys k .. k + count of a source's row, for head h: read in place where they lie right, else packed.
  Block<C> load_block(const AttentionSource& source, int64_t b, int64_t h, int64_t row, const int32_t* index, int64_t k,
                      int count, Scratch<C>& scratch) const {
    const S* keys = static_cast<const S*>(source.key) + row * source.key_stride[0] + h * source.key_stride[2];
    const S* values = static_cast<const S*>(source.value) + row * source.value_stride[0] + h * source.value_stride[2];
    auto token = [&](int i) { return index ? int64_t(index[k + i]) : k + i; };
    auto key_row = [&](int i) { return keys + token(i) * source.key_stride[1]; };
    auto value_row = [&](int i) { return values + token(i) * source.value_stride[1]; };
    const int units = scratch.units;
    Block<C> block{};
    block.keys_count = count;

    const bool in_place = !index && (std::is_same_v<S, float> || (!std::is_same_v<C, Fp32> && d % 2 == 0));
    if (in_place) {
      block.keys = reinterpret_cast<const char*>(key_row(0));
      block.key_bytes = source.key_stride[1] * int64_t(sizeof(S));
    } else {
      for (int i = 0; i < count; ++i) pack_row<S, C>(key_row(i), d, scratch.keys + int64_t(i) * units);
      block.keys = reinterpret_cast<const char*>(scratch.keys);
      block.key_bytes = units * int64_t(sizeof(typename C::Unit));
    }
    block.tail = reinterpret_cast<const char*>(scratch.tail);
    block.tail_bytes = units * int64_t(sizeof(typename C::Unit));
    if (const int rest = count % kKeyTile) {
      for (int i = 0; i < kKeyTile; ++i) {
        auto* to = scratch.tail + int64_t(i) * units;
        if (i < rest)
          pack_row<S, C>(key_row(count - rest + i), d, to);
        else
          std::fill_n(to, units, typename C::Unit(0));
      }
    }

    if constexpr (std::is_same_v<S, float>) {
      if (!index) {
        block.values = value_row(0);
        block.value_stride = source.value_stride[1];
      }
    }
    if (!block.values) {
      for (int i = 0; i < count; i += C::kPack)
        pack_values<S, C>(value_row(i), i + 1 < count ? value_row(i + 1) : nullptr, d,
                          scratch.values + int64_t(i / C::kPack) * d);
      block.values = scratch.values;
      block.value_stride = d;
    }

    auto per_head = [&](const float* x, const int64_t (&stride)[2], float otherwise) {
      return x ? x[b * stride[0] + h * stride[1]] : otherwise;
    };
    block.scale = p.scale * per_head(source.logit_scale, source.logit_scale_stride, 1.0f) * kLog2E;
    block.shift = per_head(source.logit_bias, source.logit_bias_stride, 0.0f) * kLog2E;
    if (source.key_bias || !(block.scale > 0)) {  // the lazy form needs a positive factor: max and factor commute
      const float* bias = source.key_bias ? source.key_bias + row * source.bias_stride : nullptr;
      for (int i = 0; i < kBlock + kKeyTile; ++i) {
        const float x = i >= count ? -INFINITY : bias ? bias[token(i)] : 0.0f;
        // finfo.min, times log2(e), would become -inf and hide a key that only has a low weight
        scratch.bias[i] = x > -INFINITY ? std::max(x * kLog2E + block.shift, -FLT_MAX) : x;
      }
      block.bias = scratch.bias;
    }
    return block;
  }

  void store_out(const QueryTile& tile, int64_t h, int slice, const Slice<C>& s, float* inverse) const {
    const int lanes = std::min(kSlice, tile.count - slice * kSlice);
    for (int lane = 0; lane < kSlice; ++lane) inverse[lane] = s.sum[lane] == 0 ? 0.0f : 1.0f / s.sum[lane];
    const Vec i0 = load(inverse), i1 = load(inverse + kLanes);
    for (int c = 0; c < d; ++c) {
      store(s.out + c * kSlice, load(s.out + c * kSlice) * i0);
      store(s.out + c * kSlice + kLanes, load(s.out + c * kSlice + kLanes) * i1);
    }
    S* out = static_cast<S*>(p.out) + tile.b * p.out_stride[0] + h * p.out_stride[2];
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t i = query_at(tile, slice * kSlice + lane);
      S* row = out + i * p.out_stride[1];
      for (int c = 0; c < d; ++c) from_float(s.out[c * kSlice + lane], row[c]);
      if (p.lse) {
        const float top = s.max[lane] == -FLT_MAX ? -FLT_MAX : s.max[lane] * kLn2;  // the clamp of load_block, undone
        const float lse = s.sum[lane] == 0 ? -INFINITY : top + std::log(s.sum[lane]);
        p.lse[tile.b * p.lse_stride[0] + i * p.lse_stride[1] + h * p.lse_stride[2]] = lse;
      }
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
  int slices = std::clamp<int>(kTileBytes / Scratch<C>::slice_bytes(int(p.d)), 1, kMaxSlices);
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
    Scratch<C> scratch(int(job.p.d), job.slices);
    const Attention<S, C> attention(job.p);
    const int64_t items = int64_t(job.tiles.size()) * job.p.h;
    // Tiles of one batch row and head follow each other: its keys stay in cache.
    const int64_t per_head = int64_t(job.tiles.size());
    for (int64_t i; (i = job.next.fetch_add(1)) < items;)
      attention.run(job.tiles[i % per_head], i / per_head, scratch);
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
    case DType::kFloat32: return attend<float, Fp32>(p, parallel);
    case DType::kFloat16: return attend<Float16, Fp32>(p, parallel);
    case DType::kBFloat16:
      return attend<BFloat16, std::conditional_t<LR_HAS_BF16_DOT != 0, Bf16Pairs, Fp32>>(p, parallel);
  }
}

}  // namespace lr::LR_ISA
