// lr_kernels::multi_source_attention_cpu and its backward: tensors -> AttentionParams, AttentionBackwardParams.
#include "attention.h"

#include "cpu/kernels.h"

namespace lr {
namespace {

void multi_source_attention(Tensor query, Tensors key, Tensors value, MaybeTensors rows, MaybeTensors key_index,
                            MaybeTensors key_count, std::vector<int64_t> key_block, MaybeTensors key_range,
                            MaybeTensors value_index, MaybeTensors key_bias, MaybeTensors logit_scale,
                            MaybeTensors logit_bias, MaybeTensor query_order, MaybeTensor class_start,
                            int64_t query_block, std::vector<int64_t> softmax_group, MaybeTensors weight,
                            MaybeTensors key_scale, MaybeTensors value_scale, double scale, Tensor out,
                            MaybeTensor lse) {
  Call call("multi_source_attention");
  const Lists lists{key,         value,    rows,        key_index,  key_count,  key_block,   key_range,
                    value_index, key_bias, logit_scale, logit_bias, &key_scale, &value_scale};
  AttentionParams p = forward_params(call, query, lists, query_order, class_start, query_block, softmax_group,
                                     weight.data(), weight.size(), scale);
  read_outputs(call, p, query.scalar_type(), out, lse);
  attention_cpu(p, torch_parallel());
}

void multi_source_attention_backward(Tensor grad_out, MaybeTensor grad_lse, Tensor query, Tensors key, Tensors value,
                                     MaybeTensors rows, MaybeTensors key_index, MaybeTensors key_count,
                                     std::vector<int64_t> key_block, MaybeTensors key_range, MaybeTensors value_index,
                                     MaybeTensors key_bias, MaybeTensors logit_scale, MaybeTensors logit_bias,
                                     MaybeTensor query_order, MaybeTensor class_start, int64_t query_block,
                                     double scale, Tensor out, Tensor lse, Tensor grad_query, Tensors grad_key,
                                     Tensors grad_value, Tensors grad_key_bias) {
  Call call("multi_source_attention_backward");
  const ScalarType dtype = call.floating(query, "query");
  const Lists lists{key,       value,       rows,     key_index,   key_count, key_block,
                    key_range, value_index, key_bias, logit_scale, logit_bias};
  AttentionBackwardParams g{};
  AttentionParams& p = g.forward;
  p = attention_params(call, dtype, query, lists, query_order, class_start, query_block, scale);
  const View result = call.input(out, "out", dtype, {p.b, p.n, p.h, p.e}, 1);
  const View sums = call.input(lse, "lse", ScalarType::Double, {p.b, p.n, p.h}, 0);
  const View grad = call.input(grad_out, "grad_out", dtype, {p.b, p.n, p.h, p.e}, 1);
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
    g.grad_key[i] = call.output(grad_key[i], {"grad_key", i}, ScalarType::Float, {s.r, s.m, s.k, p.d}, 4).as<float>();
    g.grad_value[i] =
        call.output(grad_value[i], {"grad_value", i}, ScalarType::Float, {s.r, s.v, s.k, p.e}, 4).as<float>();
    const Tensor& bias = grad_key_bias[i];
    if (!bias.defined() || bias.numel() == 0) continue;  // not wanted
    call.require(key_bias[i].has_value(), {"grad_key_bias", i}, "a tensor", "an empty one, since key_bias is None");
    g.grad_key_bias[i] =
        call.output(bias, {"grad_key_bias", i}, ScalarType::Float, {p.h, key_bias[i]->size(0), s.m}, 3).as<float>();
  }
  attention_backward_cpu(g, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) {
  m.impl("multi_source_attention_cpu", TORCH_BOX(&multi_source_attention));
  m.impl("multi_source_attention_backward_cpu", TORCH_BOX(&multi_source_attention_backward));
}

}  // namespace lr

// For `python -m lr_kernels info`.
extern "C" __attribute__((visibility("default"))) const char* lr_kernels_isa() { return lr::isa(); }
