// lr_kernels::attention_with_token_maps_cpu: tensors -> TokenMapsParams.
#include "bindings.h"
#include "cpu/kernels.h"

namespace lr {
namespace {

void attention_with_token_maps(Tensor query, Tensor key, Tensor value, Tensor token_indices, double scale, Tensor out,
                               Tensor maps) {
  Call call("attention_with_token_maps");
  const ScalarType dtype = call.floating(query, "query");
  const View queries = call.input(query, "query", dtype, {kAny, kAny, kAny, kAny}, 1);
  TokenMapsParams p{};
  p.b = queries.size[0];
  p.n = queries.size[1];
  p.h = queries.size[2];
  p.d = queries.size[3];
  call.require(p.d >= 1 && p.d <= kMaxHeadDim, "query", p.d, "head_dim from 1 to ", kMaxHeadDim);
  call.require(p.h >= 1, "query", p.h, "at least one head");
  const View keys = call.input(key, "key", dtype, {p.b, kAny, p.h, p.d}, 1);
  p.m = keys.size[1];
  call.require(p.m <= kMaxTokens, "key", p.m, "at most ", kMaxTokens, " keys");
  const View values = call.input(value, "value", dtype, {p.b, p.m, p.h, p.d}, 1);
  const View tokens = call.input(token_indices, "token_indices", ScalarType::Int, {p.b, kAny}, 1);
  p.t = tokens.size[1];
  call.entries("token_indices", tokens, 0, p.m - 1);
  const View result = call.output(out, "out", dtype, {p.b, p.n, p.h, p.d}, 1);
  const View shares = call.output(maps, "maps", ScalarType::Float, {p.b, p.n, p.t}, 3);
  if (result.reach == 0) return;
  p.query = queries.data;
  p.key = keys.data;
  p.value = values.data;
  p.token_indices = tokens.as<int32_t>();
  p.out = result.data;
  p.maps = shares.as<float>();
  copy_strides(queries, p.query_stride);
  copy_strides(keys, p.key_stride);
  copy_strides(values, p.value_stride);
  copy_strides(result, p.out_stride);
  p.token_stride = tokens.stride[0];
  p.dtype = dtype_of(dtype);
  p.scale = static_cast<float>(scale);
  token_maps_cpu(p, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) { m.impl("attention_with_token_maps_cpu", TORCH_BOX(&attention_with_token_maps)); }

}  // namespace lr
