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
    const int64_t begin = start ? start[0] : 0, end = start ? start[1] : p.n;
    for (int64_t i = begin; i < end; i += queries) visit(QueryTile{b, h, c, i, int(std::min(queries, end - i))});
  }
}

// A tile's queries in a [b, n, h, d] or [b, n, h] tensor.
template <class T>
class TileRows {
 public:
  TileRows(const AttentionParams& p, const QueryTile& tile, T* data, const int64_t (&stride)[3])
      : data_(data + tile.b * stride[0] + tile.h * stride[2]),
        order_(p.query_order ? p.query_order + tile.b * p.order_stride : nullptr),
        start_(tile.start),
        stride_(stride[1]) {}

  T* operator()(int64_t position) const {
    const int64_t i = start_ + position;
    return data_ + (order_ ? order_[i] : i) * stride_;
  }

 private:
  T* data_;
  const int32_t* order_;
  int64_t start_, stride_;
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
      index_ = source.key_index + tile.query_class * source.index_stride[0] + row * source.index_stride[1];
      count = source.key_count[tile.query_class * source.count_stride[0] + row * source.count_stride[1]];
    }
    keys_ = Rows(source.key, source.key_stride, source.key_scale, source.key_scale_stride, source.storage, row, tile.h);
    values_ = Rows(source.value, source.value_stride, source.value_scale, source.value_scale_stride, source.storage,
                   row, tile.h);
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
  int64_t token(int64_t i) const { return index_ ? index_[i] : i; }
  int64_t value_token(int64_t token) const { return moved_ ? moved_[token] : token; }
  StoredRow stored_key(int64_t token) const { return keys_[token]; }
  StoredRow stored_value(int64_t token) const { return values_[value_token(token)]; }
  // The same of a source that is not in 8 bits.
  const S* key(int64_t token) const { return static_cast<const S*>(keys_[token].data); }
  const S* value(int64_t token) const { return static_cast<const S*>(values_[value_token(token)].data); }
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
};

}  // namespace
}  // namespace lr::LR_ISA
