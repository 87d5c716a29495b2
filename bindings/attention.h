// multi_source_attention: tensors -> AttentionParams, checked, for the bindings of all backends. On a CUDA device
// nobody looks into index tables, since the host would have to wait for them.
#pragma once
#include "bindings.h"

namespace lr {

// The tensors of one source.
struct SourceTensors {
  const Tensor &key, &value;
  const MaybeTensor &rows, &key_index, &key_count, &value_index, &key_bias, &logit_scale, &logit_bias;
  const MaybeTensor *key_scale = nullptr, *value_scale = nullptr;  // null: the op takes no 8-bit keys
  const MaybeTensor* key_range = nullptr;                          // null: the op takes none
  int64_t key_block = 1;
};

// The arguments of the schema that have one entry per source.
struct Lists {
  const Tensors &key, &value;
  const MaybeTensors &rows, &key_index, &key_count;
  const std::vector<int64_t>& key_block;
  const MaybeTensors &key_range, &value_index, &key_bias, &logit_scale, &logit_bias;
  const MaybeTensors *key_scale = nullptr, *value_scale = nullptr;  // null: the op takes no 8-bit keys

  // Refuses lists of several lengths; returns how many sources there are.
  size_t count(const Call& call) const {
    const size_t sources = key.size();
    call.count(sources, "key", 1, kMaxSources);
    const auto as_many = [&](size_t entries, const char* name) { call.count(entries, name, sources, sources); };
    as_many(value.size(), "value");
    as_many(rows.size(), "rows");
    as_many(key_index.size(), "key_index");
    as_many(key_count.size(), "key_count");
    as_many(key_block.size(), "key_block");
    as_many(key_range.size(), "key_range");
    as_many(value_index.size(), "value_index");
    as_many(key_bias.size(), "key_bias");
    as_many(logit_scale.size(), "logit_scale");
    as_many(logit_bias.size(), "logit_bias");
    if (key_scale) as_many(key_scale->size(), "key_scale");
    if (value_scale) as_many(value_scale->size(), "value_scale");
    return sources;
  }
  SourceTensors operator[](size_t i) const {
    return {key[i],
            value[i],
            rows[i],
            key_index[i],
            key_count[i],
            value_index[i],
            key_bias[i],
            logit_scale[i],
            logit_bias[i],
            key_scale ? &(*key_scale)[i] : nullptr,
            value_scale ? &(*value_scale)[i] : nullptr,
            &key_range[i],
            key_block[i]};
  }
};

// Reads which keys each class sees. Only the first key_count entries of a list are checked: the kernel reads no more.
inline void read_key_lists(Call& call, const AttentionParams& p, AttentionSource& s, int64_t i, const Tensor& index,
                           const Tensor& count) {
  const int64_t entries = (s.m + s.key_block - 1) / s.key_block;
  const View counts = call.input(count, {"key_count", i}, ScalarType::Int, {one_or(p.c), one_or(s.r), one_or(p.h)}, 0);
  const View lists = call.input(index, {"key_index", i}, ScalarType::Int,
                                {counts.size[0], counts.size[1], counts.size[2], entries}, 1);
  s.key_index = lists.as<int32_t>();
  s.key_count = counts.as<int32_t>();
  copy_strides(lists, s.index_stride);
  copy_strides(counts, s.count_stride);
  if (!call.on_cpu()) return;
  for (int64_t c = 0; c < counts.size[0]; ++c)
    for (int64_t r = 0; r < counts.size[1]; ++r)
      for (int64_t h = 0; h < counts.size[2]; ++h) {
        const auto at = [&](const int64_t (&stride)[3]) { return c * stride[0] + r * stride[1] + h * stride[2]; };
        const int32_t* listed = s.key_count + at(s.count_stride);
        call.entries({"key_count", i}, listed, 1, 0, entries);
        const int32_t* entry = s.key_index + at(s.index_stride);
        call.entries({"key_index", i}, entry, *listed, 0, entries - 1);
        // a shorter last block comes last: the kernel takes all others for whole
        if (s.m % s.key_block) call.entries({"key_index", i}, entry, *listed - 1, 0, entries - 2);
      }
}

// How keys lie in memory, where they are not of the query's dtype.
inline Storage storage_of(const Tensor& key) {
  return Call::is(key, ScalarType::Char)            ? Storage::kInt8
         : Call::is(key, ScalarType::Float8_e4m3fn) ? Storage::kFloat8
                                                    : Storage::kElements;
}

inline AttentionSource source_params(Call& call, AttentionParams& p, ScalarType dtype, int64_t i,
                                     const SourceTensors& x) {
  AttentionSource s{};
  if (x.key_scale && x.key.defined() && !Call::is(x.key, dtype)) s.storage = storage_of(x.key);
  const bool eight_bit = s.storage != Storage::kElements;
  if (eight_bit) dtype = s.storage == Storage::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  const View key = call.input(x.key, {"key", i}, dtype, {kAny, kAny, kAny, p.d}, 1);
  s.r = key.size[0];
  s.m = key.size[1];
  s.k = key.size[2];
  call.require(s.k == p.h || (s.k > 0 && p.h % s.k == 0), {"key", i}, s.k, p.h, " heads or a divisor of it");
  s.heads_per_key_head = s.k > 0 ? static_cast<int32_t>(p.h / s.k) : 1;
  const View value =
      call.input(x.value, {"value", i}, dtype, {s.r, x.value_index ? kAny : s.m, s.k, i == 0 ? kAny : p.e}, 1);
  s.v = value.size[1];
  p.e = value.size[3];
  call.require(p.e >= 1 && p.e <= kMaxHeadDim, {"value", i}, p.e, "head_dim from 1 to ", kMaxHeadDim);
  for (const int64_t tokens : {s.r, s.m, s.v})
    call.require(tokens <= kMaxTokens, {"key", i}, tokens, "at most ", kMaxTokens, " rows, keys and values");
  s.key = key.data;
  s.value = value.data;
  copy_strides(key, s.key_stride);
  copy_strides(value, s.value_stride);
  if (const MaybeTensor& rows = x.rows) {
    s.rows = call.input(*rows, {"rows", i}, ScalarType::Int, {p.b}, 1).as<int32_t>();
    if (call.on_cpu()) call.entries({"rows", i}, s.rows, p.b, -1, s.r - 1);
  } else {
    call.require(s.r == 1 || s.r == p.b, {"rows", i}, "None", "a tensor, since key has ", s.r, " rows for a batch of ",
                 p.b);
  }
  call.require(x.key_index.has_value() == x.key_count.has_value(), {"key_count", i}, "one without the other",
               "a tensor beside key_index, or neither");
  call.require(x.key_block >= 1 && x.key_block <= kMaxKeyBlock && (x.key_block & (x.key_block - 1)) == 0,
               {"key_block", i}, x.key_block, "a power of two up to ", kMaxKeyBlock);
  s.key_block = static_cast<int32_t>(x.key_block);
  if (x.key_index) read_key_lists(call, p, s, i, *x.key_index, *x.key_count);
  if (x.key_range && *x.key_range) {
    const View ranges = call.input(**x.key_range, {"key_range", i}, ScalarType::Int, {one_or(p.b), p.n, 2}, 2);
    s.key_range = ranges.as<int32_t>();
    s.range_stride = ranges.stride[0];
  }
  if (const MaybeTensor& value_index = x.value_index) {
    const View moved = call.input(*value_index, {"value_index", i}, ScalarType::Int, {kAny, s.m}, 1);
    const bool per_row = moved.size[0] == 1 || moved.size[0] == s.r;
    call.require(per_row || moved.size[0] == p.b, {"value_index", i}, moved.size[0], s.r, ", ", p.b, " or 1 rows");
    if (call.on_cpu()) call.entries({"value_index", i}, moved, 0, s.v - 1);
    s.value_index = moved.as<int32_t>();
    s.value_index_stride[per_row ? 0 : 1] = moved.stride[0];
  }
  if (const MaybeTensor& key_bias = x.key_bias) {
    const View bias = call.input(*key_bias, {"key_bias", i}, ScalarType::Float, {one_or(s.r), s.m}, 1);
    s.key_bias = bias.as<float>();
    s.bias_rows = bias.size[0];
    s.bias_stride = bias.stride[0];
  }
  const auto per_head = [&](const MaybeTensor& table, const char* name, const float*& data, int64_t (&stride)[2]) {
    if (!table) return;
    const View view = call.input(*table, {name, i}, ScalarType::Float, {p.b, p.h}, 0);
    data = view.as<float>();
    copy_strides(view, stride);
  };
  per_head(x.logit_scale, "logit_scale", s.logit_scale, s.logit_scale_stride);
  per_head(x.logit_bias, "logit_bias", s.logit_bias, s.logit_bias_stride);
  const auto per_token = [&](const MaybeTensor& table, const char* name, int64_t tokens, const float*& data,
                             int64_t (&stride)[3]) {
    call.require(table.has_value() == eight_bit, {name, i}, table ? "a tensor" : "None",
                 eight_bit ? "a tensor beside an 8-bit key" : "None beside a key of the query's dtype");
    if (!table) return;
    const View view = call.input(*table, {name, i}, ScalarType::Float, {one_or(s.r), one_or(tokens), one_or(s.k)}, 0);
    data = view.as<float>();
    copy_strides(view, stride);
  };
  if (x.key_scale) per_token(*x.key_scale, "key_scale", s.m, s.key_scale, s.key_scale_stride);
  if (x.value_scale) per_token(*x.value_scale, "value_scale", s.v, s.value_scale, s.value_scale_stride);
  return s;
}

// Reads the order of the queries, class by class. The classes must follow each other and cover all of query_order.
inline void read_query_order(Call& call, AttentionParams& p, const MaybeTensor& query_order,
                             const MaybeTensor& class_start, int64_t query_block) {
  p.c = 1;
  call.require(query_block >= 0 && query_block <= kMaxTokens, "query_block", query_block, "0 to ", kMaxTokens);
  call.require(!query_block || !query_order, "query_order", "a tensor", "None beside a query_block");
  if (query_block) {
    p.query_block = query_block;
    p.c = (p.n + query_block - 1) / query_block;
  }
  call.require(query_order.has_value() == class_start.has_value(), "class_start", "one without the other",
               "a tensor beside query_order, or neither");
  if (!query_order) return;
  const View order = call.input(*query_order, "query_order", ScalarType::Int, {one_or(p.b), p.n}, 1);
  const View start = call.input(*class_start, "class_start", ScalarType::Int, {one_or(p.b), kAny}, 1);
  call.require(start.size[1] >= 2, "class_start", start.size[1], "at least 2 entries");
  call.require(p.n <= kMaxTokens, "query", p.n, "at most ", kMaxTokens, " tokens");
  p.query_order = order.as<int32_t>();
  p.class_start = start.as<int32_t>();
  p.order_stride = order.stride[0];
  p.class_stride = start.stride[0];
  p.c = start.size[1] - 1;
  if (!call.on_cpu()) return;
  call.entries("query_order", order, 0, p.n - 1);
  for (int64_t b = 0; b < (p.class_stride == 0 ? 1 : p.b) && start.reach > 0; ++b) {
    const int32_t* at = p.class_start + b * p.class_stride;
    bool fits = at[0] == 0 && at[p.c] == p.n;
    for (int64_t c = 0; c < p.c; ++c) fits &= at[c] <= at[c + 1];
    call.require(fits, "class_start", "others", "entries that ascend from 0 to ", p.n);
  }
}

// What the forward and the backward pass share: all but the outputs and the softmax groups.
template <class Sources>
AttentionParams attention_params(Call& call, ScalarType dtype, const Tensor& query, const Sources& lists,
                                 const MaybeTensor& query_order, const MaybeTensor& class_start, int64_t query_block,
                                 double scale) {
  const View queries = call.input(query, "query", dtype, {kAny, kAny, kAny, kAny}, 1);
  AttentionParams p{};
  p.query = queries.data;
  p.b = queries.size[0];
  p.n = queries.size[1];
  p.h = queries.size[2];
  p.d = queries.size[3];
  call.require(p.d >= 1 && p.d <= kMaxHeadDim, "query", p.d, "head_dim from 1 to ", kMaxHeadDim);
  copy_strides(queries, p.query_stride);
  read_query_order(call, p, query_order, class_start, query_block);
  const size_t sources = lists.count(call);
  p.sources = static_cast<int32_t>(sources);
  for (int32_t i = 0; i < p.sources; ++i) p.source[i] = source_params(call, p, dtype, i, lists[i]);
  p.softmax_groups = 1;
  p.dtype = dtype_of(dtype);
  p.scale = static_cast<float>(scale);
  return p;
}

// All inputs of the forward pass.
template <class Sources>
AttentionParams forward_params(Call& call, const Tensor& query, const Sources& lists, const MaybeTensor& query_order,
                               const MaybeTensor& class_start, int64_t query_block,
                               const std::vector<int64_t>& softmax_group, const MaybeTensor* weight, size_t weights,
                               double scale) {
  const ScalarType dtype = call.floating(query, "query");
  AttentionParams p = attention_params(call, dtype, query, lists, query_order, class_start, query_block, scale);
  call.count(softmax_group.size(), "softmax_group", p.sources, p.sources);
  int64_t groups = 0;
  for (int32_t i = 0; i < p.sources; ++i) {
    const int64_t group = softmax_group[i];
    call.require(group == groups || (i > 0 && group == groups - 1), {"softmax_group", i}, group,
                 "numbers that ascend from 0 in steps of 1");
    p.source[i].softmax_group = static_cast<int32_t>(group);
    groups = group + 1;
  }
  call.count(weights, "weight", groups, groups);
  p.softmax_groups = static_cast<int32_t>(groups);
  for (int32_t g = 0; g < p.softmax_groups; ++g) {
    if (!weight[g]) continue;
    const View view = call.input(*weight[g], {"weight", g}, ScalarType::Float, {p.b, p.n}, 0);
    p.weight[g] = view.as<float>();
    copy_strides(view, p.weight_stride[g]);
  }
  return p;
}

// Its outputs.
inline void read_outputs(Call& call, AttentionParams& p, ScalarType dtype, const Tensor& out, const MaybeTensor& lse) {
  const View result = call.output(out, "out", dtype, {p.b, p.n, p.h, p.e}, 1);
  p.out = result.data;
  copy_strides(result, p.out_stride);
  if (!lse) return;
  call.require(p.softmax_groups == 1, "lse", "a tensor", "None, since each of ", p.softmax_groups,
               " softmax groups has its own");
  p.lse_is_double = lse->defined() && Call::is(*lse, ScalarType::Double);
  const ScalarType lse_dtype = p.lse_is_double ? ScalarType::Double : ScalarType::Float;
  const View sums = call.output(*lse, "lse", lse_dtype, {p.b, p.n, p.h}, 0);
  p.lse = sums.data;
  copy_strides(sums, p.lse_stride);
}

}  // namespace lr
