// What both directions of multi_source_attention read alike: tiles of queries, and the keys of a source that a tile
// sees.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/attention_block.h"
#include "cpu/eight_bit.h"
#include "params.h"

namespace lr::LR_ISA {
namespace {

// Queries of one batch row, head and class: they see the same keys.
struct QueryTile {
  int64_t b, h, query_class;
  int64_t start;  // position in query_order
  int count;

  int slices() const { return (count + kSlice - 1) / kSlice; }
};

// Calls visit(tile) for tiles of up to `queries` queries that cover batch row b and head h, class by class.
template <class Visit>
void each_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t queries, const Visit& visit) {
  for (int64_t c = 0; c < p.c; ++c) {
    const int32_t* start = p.class_start ? p.class_start + b * p.class_stride + c : nullptr;
    const int64_t begin = start ? start[0] : c * p.query_block;
    const int64_t end = start ? start[1] : p.query_block ? std::min(p.n, begin + p.query_block) : p.n;
    for (int64_t i = begin; i < end; i += queries) visit(QueryTile{b, h, c, i, int(std::min(queries, end - i))});
  }
}

// Which query stands at a position of a tile.
class TileOrder {
 public:
  TileOrder(const AttentionParams& p, const QueryTile& tile)
      : order_(p.query_order ? p.query_order + tile.b * p.order_stride : nullptr), start_(tile.start) {}

  int64_t operator()(int64_t position) const {
    const int64_t i = start_ + position;
    return order_ ? order_[i] : i;
  }

 private:
  const int32_t* order_;
  int64_t start_;
};

// A tile's queries in a [b, n, h, d] or [b, n, h] tensor.
template <class T>
class TileRows {
 public:
  TileRows(const AttentionParams& p, const QueryTile& tile, T* data, const int64_t (&stride)[3])
      : data_(data + tile.b * stride[0] + tile.h * stride[2]), order_(p, tile), stride_(stride[1]) {}

  T* operator()(int64_t position) const { return data_ + order_(position) * stride_; }

 private:
  T* data_;
  TileOrder order_;
  int64_t stride_;
};

// Places [first, last) in the list of a source's visible keys.
struct Places {
  int64_t first, last;
  bool empty() const { return first >= last; }
  Places within(const Places& other) const { return {std::max(first, other.first), std::min(last, other.last)}; }
};

// The row of a source that batch row b reads, or -1.
inline int64_t row_of(const AttentionSource& source, int64_t b) {
  return source.rows ? source.rows[b] : source.r == 1 ? 0 : b;
}

// A bias in log2 units, plus the shift of its source. What is finite stays finite: a key with a bias of finfo.min has
// a low weight and is not hidden.
inline float to_log2(float bias, float shift) {
  const float x = bias * kLog2E + shift;
  return std::isfinite(bias) && std::isfinite(shift) ? std::clamp(x, -FLT_MAX, FLT_MAX) : x;
}

// The keys of a source that a tile sees, their values, and how their scores become logits.
template <class S>
struct VisibleKeys {
  int64_t row;        // of the source, or -1: the batch row does not read it
  int64_t count = 0;  // of visible keys
  float logit_scale = 1, logit_bias = 0;
  float shift = 0;              // logit_bias in log2 units
  const float* bias = nullptr;  // of each token, or null

  VisibleKeys(const AttentionSource& source, const QueryTile& tile) : row(row_of(source, tile.b)) {
    if (row < 0) return;
    count = source.m;
    if (source.key_index) {
      const auto at = [&](const int64_t (&stride)[3]) {
        return tile.query_class * stride[0] + row * stride[1] + tile.h * stride[2];
      };
      index_ = source.key_index + at(source.index_stride);
      count = source.key_count[at(source.count_stride)];
      while (source.key_block >> shift_ > 1) ++shift_;
      if (shift_ && count > 0) {  // the last block of keys may be shorter
        const int64_t beyond = (int64_t(index_[count - 1]) + 1) * source.key_block - source.m;
        count = (count << shift_) - std::max<int64_t>(beyond, 0);
      }
    }
    const int64_t head = tile.h / source.heads_per_key_head;
    keys_ = Rows(source.key, source.key_stride, source.key_scale, source.key_scale_stride, source.storage, row, head);
    values_ = Rows(source.value, source.value_stride, source.value_scale, source.value_scale_stride, source.storage,
                   row, head);
    if (source.value_index)
      moved_ = source.value_index + row * source.value_index_stride[0] + tile.b * source.value_index_stride[1];
    if (source.key_bias) bias = source.key_bias + row * source.bias_stride;
    const auto per_head = [&](const float* x, const int64_t (&stride)[2], float otherwise) {
      return x ? x[tile.b * stride[0] + tile.h * stride[1]] : otherwise;
    };
    logit_scale = per_head(source.logit_scale, source.logit_scale_stride, 1.0f);
    logit_bias = per_head(source.logit_bias, source.logit_bias_stride, 0.0f);
    shift = to_log2(logit_bias, 0.0f);
  }

  // The token of the i-th visible key; what follows is of a token.
  int64_t token(int64_t i) const {
    if (!index_) return i;
    return shift_ ? (int64_t(index_[i >> shift_]) << shift_) + (i & ((int64_t(1) << shift_) - 1)) : index_[i];
  }
  int64_t value_token(int64_t token) const { return moved_ ? moved_[token] : token; }
  StoredRow stored_key(int64_t token) const { return keys_[token]; }
  StoredRow stored_value(int64_t token) const { return values_[value_token(token)]; }
  // The same of a source that is not in 8 bits.
  const S* key(int64_t token) const { return static_cast<const S*>(keys_[token].data); }
  const S* value(int64_t token) const { return static_cast<const S*>(values_[value_token(token)].data); }
  // The place of the first visible key whose token is `token` or a later one.
  int64_t place_of(int64_t token) const {
    if (!index_) return std::clamp<int64_t>(token, 0, count);
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (this->token(middle) < token)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  // The visible keys in a query's entry of key_range.
  Places places_of(const int32_t* range) const { return {place_of(range[0]), place_of(range[1])}; }
  float bias_of(int64_t token) const { return bias ? bias[token] : 0.0f; }
  float log2_bias_of(int64_t token) const { return bias ? to_log2(bias[token], shift) : shift; }  // with the shift

 private:
  // The keys, or the values, of one row and head.
  struct Rows {
    const char* data = nullptr;
    const float* scale = nullptr;         // or null: 1
    int64_t bytes = 0, scale_stride = 0;  // from token to token
    Storage storage = Storage::kElements;

    Rows() = default;
    Rows(const void* all, const int64_t (&stride)[3], const float* scales, const int64_t (&step)[3], Storage kind,
         int64_t row, int64_t h)
        : scale_stride(step[1]), storage(kind) {
      const int64_t size = kind == Storage::kElements ? sizeof(S) : 1;
      data = static_cast<const char*>(all) + (row * stride[0] + h * stride[2]) * size;
      bytes = stride[1] * size;
      if (scales) scale = scales + row * step[0] + h * step[2];
    }
    StoredRow operator[](int64_t token) const {
      return {data + token * bytes, scale ? scale[token * scale_stride] : 1.0f, storage};
    }
  };
  Rows keys_, values_;
  const int32_t *index_ = nullptr, *moved_ = nullptr;
  int shift_ = 0;  // log2 of the keys of an entry of index_
};

// Which visible keys of a source each query of a tile sees by its entry of key_range.
class TileRanges {
 public:
  static constexpr int kRoom = 2 * kSlice + 4;  // numbers for each slice of a tile

  // room: [slices, kRoom]
  TileRanges(int32_t* room, int slices)
      : first_(room), last_(first_ + slices * kSlice), of_slices_(last_ + slices * kSlice) {}

  template <class S>
  void read(const AttentionParams& p, const QueryTile& tile, const AttentionSource& source,
            const VisibleKeys<S>& keys) {
    const TileOrder order(p, tile);
    const int32_t* ranges = source.key_range + tile.b * source.range_stride;
    for (int s = 0; s < tile.slices(); ++s) {
      int32_t least[2] = {INT32_MAX, INT32_MAX}, most[2] = {0, 0};  // of the first places, of the last ones
      for (int i = s * kSlice; i < (s + 1) * kSlice; ++i) {  // lanes past the end of the tile repeat its last query
        const Places seen = keys.places_of(ranges + 2 * order(std::min(i, tile.count - 1)));
        first_[i] = seen.empty() ? INT32_MAX : int32_t(seen.first);
        last_[i] = seen.empty() ? 0 : int32_t(seen.last);
        least[0] = std::min(least[0], first_[i]), most[0] = std::max(most[0], first_[i]);
        least[1] = std::min(least[1], last_[i]), most[1] = std::max(most[1], last_[i]);
      }
      int32_t* x = of_slices_ + s * 4;
      x[0] = least[0], x[1] = most[0], x[2] = least[1], x[3] = most[1];
    }
  }
  // The places from the first that some query of these slices sees to the last.
  Places hull(int slice, int slices) const {
    Places all{INT32_MAX, 0};
    for (const int32_t* x = of_slices_ + slice * 4; x < of_slices_ + (slice + slices) * 4; x += 4)
      all = {std::min<int64_t>(all.first, x[0]), std::max<int64_t>(all.last, x[3])};
    return all;
  }
  // Whether each query of a slice sees all these places.
  bool whole(int slice, const Places& places) const {
    const int32_t* x = of_slices_ + slice * 4;
    return x[1] <= places.first && x[2] >= places.last;
  }
  // What each query of a slice sees of `count` keys from place `start` on, as numbers for lanes.
  LaneRange lanes(int slice, int64_t start, int count, float (&first)[kSlice], float (&last)[kSlice]) const {
    const auto place = [&](int32_t seen) { return int(std::clamp<int64_t>(seen - start, 0, count)); };
    for (int i = 0; i < kSlice; ++i) {
      first[i] = float(place(first_[slice * kSlice + i]));
      last[i] = float(place(last_[slice * kSlice + i]));
    }
    const int32_t* x = of_slices_ + slice * 4;
    return {first, last, place(x[1]), place(x[2])};
  }

 private:
  int32_t *first_, *last_;  // [slices, kSlice]
  int32_t* of_slices_;      // [slices, 4] smallest and largest of first_, smallest and largest of last_
};

}  // namespace
}  // namespace lr::LR_ISA
