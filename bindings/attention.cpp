// lr_kernels::multi_source_attention_cpu and its backward: tensors -> AttentionParams, AttentionBackwardParams.
#include "bindings.h"
#include "cpu/kernels.h"

namespace lr {
namespace {

// The arguments that have one entry per source, as in the schema.
struct Lists {
  const Tensors &key, &value;
  const MaybeTensors &rows, &key_index, &key_count, &value_index, &key_bias, &logit_scale, &logit_bias;
};

// Reads which keys each class sees. Only the first key_count entries of a list are checked: the kernel reads no more.
void read_key_lists(Call& call, AttentionSource& s, int64_t i, int64_t classes, const Tensor& index,
                    const Tensor& count) {
  const View counts = call.input(count, {"key_count", i}, ScalarType::Int, {one_or(classes), one_or(s.r)}, 0);
  const View lists = call.input(index, {"key_index", i}, ScalarType::Int, {counts.size[0], counts.size[1], s.m}, 1);
  s.key_index = lists.as<int32_t>();
  s.key_count = counts.as<int32_t>();
  copy_strides(lists, s.index_stride);
  copy_strides(counts, s.count_stride);
  for (int64_t c = 0; c < counts.size[0]; ++c)
    for (int64_t r = 0; r < counts.size[1]; ++r) {
      const int32_t* listed = s.key_count + c * s.count_stride[0] + r * s.count_stride[1];
      call.entries({"key_count", i}, listed, 1, 0, s.m);
      call.entries({"key_index", i}, s.key_index + c * s.index_stride[0] + r * s.index_stride[1], *listed, 0, s.m - 1);
    }
}

AttentionSource source_params(Call& call, const AttentionParams& p, ScalarType dtype, int64_t i, const Lists& x) {
  const View key = call.input(x.key[i], {"key", i}, dtype, {kAny, kAny, p.h, p.d}, 1);
  AttentionSource s{};
  s.r = key.size[0];
  s.m = key.size[1];
  const View value = call.input(x.value[i], {"value", i}, dtype, {s.r, x.value_index[i] ? kAny : s.m, p.h, p.d}, 1);
  s.v = value.size[1];
  for (const int64_t tokens : {s.r, s.m, s.v})
    call.require(tokens <= kMaxTokens, {"key", i}, tokens, "at most ", kMaxTokens, " rows, keys and values");
  s.key = key.data;
  s.value = value.data;
  copy_strides(key, s.key_stride);
  copy_strides(value, s.value_stride);
  if (const MaybeTensor& rows = x.rows[i]) {
    s.rows = call.input(*rows, {"rows", i}, ScalarType::Int, {p.b}, 1).as<int32_t>();
    call.entries({"rows", i}, s.rows, p.b, -1, s.r - 1);
  } else {
    call.require(s.r == 1 || s.r == p.b, {"rows", i}, "None", "a tensor, since key has ", s.r, " rows for a batch of ",
                 p.b);
  }
  call.require(x.key_index[i].has_value() == x.key_count[i].has_value(), {"key_count", i}, "one without the other",
               "a tensor beside key_index, or neither");
  if (x.key_index[i]) read_key_lists(call, s, i, p.c, *x.key_index[i], *x.key_count[i]);
  if (const MaybeTensor& value_index = x.value_index[i]) {
    const View moved = call.input(*value_index, {"value_index", i}, ScalarType::Int, {kAny, s.m}, 1);
    const bool per_row = moved.size[0] == 1 || moved.size[0] == s.r;
    call.require(per_row || moved.size[0] == p.b, {"value_index", i}, moved.size[0], s.r, ", ", p.b, " or 1 rows");
    call.entries({"value_index", i}, moved, 0, s.v - 1);
    s.value_index = moved.as<int32_t>();
    s.value_index_stride[per_row ? 0 : 1] = moved.stride[0];
  }
  if (const MaybeTensor& key_bias = x.key_bias[i]) {
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
  per_head(x.logit_scale[i], "logit_scale", s.logit_scale, s.logit_scale_stride);
  per_head(x.logit_bias[i], "logit_bias", s.logit_bias, s.logit_bias_stride);
  return s;
}

// Reads the order of the queries, class by class. The classes must follow each other and cover all of query_order.
void read_query_order(Call& call, AttentionParams& p, const MaybeTensor& query_order, const MaybeTensor& class_start) {
  p.c = 1;
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
  call.entries("query_order", order, 0, p.n - 1);
  for (int64_t b = 0; b < (p.class_stride == 0 ? 1 : p.b) && start.reach > 0; ++b) {
    const int32_t* at = p.class_start + b * p.class_stride;
    bool fits = at[0] == 0 && at[p.c] == p.n;
    for (int64_t c = 0; c < p.c; ++c) fits &= at[c] <= at[c + 1];
    call.require(fits, "class_start", "others", "entries that ascend from 0 to ", p.n);
  }
}

// All but the outputs and the softmax groups.
AttentionParams attention_params(Call& call, ScalarType dtype, const Tensor& query, const Lists& lists,
                                 const MaybeTensor& query_order, const MaybeTensor& class_start, double scale) {
  const View queries = call.input(query, "query", dtype, {kAny, kAny, kAny, kAny}, 1);
  AttentionParams p{};
  p.query = queries.data;
  p.b = queries.size[0];
  p.n = queries.size[1];
  p.h = queries.size[2];
  p.d = queries.size[3];
  call.require(p.d >= 1 && p.d <= kMaxHeadDim, "query", p.d, "head_dim from 1 to ", kMaxHeadDim);
  copy_strides(queries, p.query_stride);
  read_query_order(call, p, query_order, class_start);
  const size_t sources = lists.key.size();
  call.count(sources, "key", 1, kMaxSources);
  const auto as_many = [&](size_t entries, const char* name) { call.count(entries, name, sources, sources); };
  as_many(lists.value.size(), "value");
  as_many(lists.rows.size(), "rows");
  as_many(lists.key_index.size(), "key_index");
  as_many(lists.key_count.size(), "key_count");
  as_many(lists.value_index.size(), "value_index");
  as_many(lists.key_bias.size(), "key_bias");
  as_many(lists.logit_scale.size(), "logit_scale");
  as_many(lists.logit_bias.size(), "logit_bias");
  p.sources = static_cast<int32_t>(sources);
  for (int32_t i = 0; i < p.sources; ++i) p.source[i] = source_params(call, p, dtype, i, lists);
  p.softmax_groups = 1;
  p.dtype = dtype_of(dtype);
  p.scale = static_cast<float>(scale);
  return p;
}

void multi_source_attention(Tensor query, Tensors key, Tensors value, MaybeTensors rows, MaybeTensors key_index,
                            MaybeTensors key_count, MaybeTensors value_index, MaybeTensors key_bias,
                            MaybeTensors logit_scale, MaybeTensors logit_bias, MaybeTensor query_order,
                            MaybeTensor class_start, std::vector<int64_t> softmax_group, MaybeTensors weight,
                            double scale, Tensor out, MaybeTensor lse) {
  Call call("multi_source_attention");
  const ScalarType dtype = call.floating(query, "query");
  const Lists lists{key, value, rows, key_index, key_count, value_index, key_bias, logit_scale, logit_bias};
  AttentionParams p = attention_params(call, dtype, query, lists, query_order, class_start, scale);
  call.count(softmax_group.size(), "softmax_group", p.sources, p.sources);
  int64_t groups = 0;
  for (int32_t i = 0; i < p.sources; ++i) {
    const int64_t group = softmax_group[i];
    call.require(group == groups || (i > 0 && group == groups - 1), {"softmax_group", i}, group,
                 "numbers that ascend from 0 in steps of 1");
    p.source[i].softmax_group = static_cast<int32_t>(group);
    groups = group + 1;
  }
  call.count(weight.size(), "weight", groups, groups);
  p.softmax_groups = static_cast<int32_t>(groups);
  for (int32_t g = 0; g < p.softmax_groups; ++g) {
    if (!weight[g]) continue;
    const View view = call.input(*weight[g], {"weight", g}, ScalarType::Float, {p.b, p.n}, 0);
    p.weight[g] = view.as<float>();
    copy_strides(view, p.weight_stride[g]);
  }
  const View result = call.output(out, "out", dtype, {p.b, p.n, p.h, p.d}, 1);
  p.out = result.data;
  copy_strides(result, p.out_stride);
  if (lse) {
    call.require(groups == 1, "lse", "a tensor", "None, since each of ", groups, " softmax groups has its own");
    p.lse_is_double = lse->defined() && Call::is(*lse, ScalarType::Double);
    const ScalarType lse_dtype = p.lse_is_double ? ScalarType::Double : ScalarType::Float;
    const View sums = call.output(*lse, "lse", lse_dtype, {p.b, p.n, p.h}, 0);
    p.lse = sums.data;
    copy_strides(sums, p.lse_stride);
  }
  attention_cpu(p, torch_parallel());
}

void multi_source_attention_backward(Tensor grad_out, MaybeTensor grad_lse, Tensor query, Tensors key, Tensors value,
                                     MaybeTensors rows, MaybeTensors key_index, MaybeTensors key_count,
                                     MaybeTensors value_index, MaybeTensors key_bias, MaybeTensors logit_scale,
                                     MaybeTensors logit_bias, MaybeTensor query_order, MaybeTensor class_start,
                                     double scale, Tensor out, Tensor lse, Tensor grad_query, Tensors grad_key,
                                     Tensors grad_value, Tensors grad_key_bias) {
  Call call("multi_source_attention_backward");
  const ScalarType dtype = call.floating(query, "query");
  const Lists lists{key, value, rows, key_index, key_count, value_index, key_bias, logit_scale, logit_bias};
  AttentionBackwardParams g{};
  AttentionParams& p = g.forward;
  p = attention_params(call, dtype, query, lists, query_order, class_start, scale);
  const View result = call.input(out, "out", dtype, {p.b, p.n, p.h, p.d}, 1);
  const View sums = call.input(lse, "lse", ScalarType::Double, {p.b, p.n, p.h}, 0);
  const View grad = call.input(grad_out, "grad_out", dtype, {p.b, p.n, p.h, p.d}, 1);
  p.out = result.data;
  p.lse = sums.data;
  p.lse_is_double = true;
  g.grad_out = grad.data;
  copy_strides(result, p.out_stride);
  copy_strides(sums, p.lse_stride);
  copy_strides(grad, g.grad_out_stride);
  if (grad_lse) {
    const View grad_sums = call.input(*grad_lse, "grad_lse", ScalarType::Float, {p.b, p.n, p.h}, 0);
    g.grad_lse = grad_sums.as<float>();
    copy_strides(grad_sums, g.grad_lse_stride);
  }
  g.grad_query = call.output(grad_query, "grad_query", dtype, {p.b, p.n, p.h, p.d}, 4).data;
  call.count(grad_key.size(), "grad_key", p.sources, p.sources);
  call.count(grad_value.size(), "grad_value", p.sources, p.sources);
  call.count(grad_key_bias.size(), "grad_key_bias", p.sources, p.sources);
  for (int32_t i = 0; i < p.sources; ++i) {
    const AttentionSource& s = p.source[i];
    g.grad_key[i] = call.output(grad_key[i], {"grad_key", i}, ScalarType::Float, {s.r, s.m, p.h, p.d}, 4).as<float>();
    g.grad_value[i] =
        call.output(grad_value[i], {"grad_value", i}, ScalarType::Float, {s.r, s.v, p.h, p.d}, 4).as<float>();
    const Tensor& bias = grad_key_bias[i];
    if (!bias.defined() || bias.numel() == 0) continue;  // not wanted
    call.require(key_bias[i].has_value(), {"grad_key_bias", i}, "a tensor", "an empty one, since key_bias is None");
    g.grad_key_bias[i] =
        call.output(bias, {"grad_key_bias", i}, ScalarType::Float, {p.h, key_bias[i]->size(0), s.m}, 3).as<float>();
  }
  attention_backward_cpu(g, torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("multi_source_attention_cpu", TORCH_BOX(&multi_source_attention));
  m.impl("multi_source_attention_backward_cpu", TORCH_BOX(&multi_source_attention_backward));
}

}  // namespace lr

// For `python -m lr_kernels info`.
extern "C" __attribute__((visibility("default"))) const char* lr_kernels_isa() { return lr::isa(); }
