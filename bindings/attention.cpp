// lr_kernels::multi_source_attention_cpu and its backward: tensors -> AttentionParams, AttentionBackwardParams.
#include "cpu/attention.h"

#include "bindings.h"
#include "cpu/attention_backward.h"
#include "cpu/dispatch.h"

namespace {

using lr::Tensor;
using MaybeTensor = std::optional<Tensor>;

lr::AttentionSource source_params(int64_t i, const Tensor& key, const Tensor& value, const MaybeTensor& rows,
                                  const MaybeTensor& key_index, const MaybeTensor& key_count,
                                  const MaybeTensor& value_index, const MaybeTensor& key_bias,
                                  const MaybeTensor& logit_scale, const MaybeTensor& logit_bias) {
  lr::AttentionSource s{};
  s.key = key.data_ptr();
  s.value = value.data_ptr();
  s.r = key.size(0);
  s.m = key.size(1);
  s.v = value.size(1);
  lr::strides3(key, s.key_stride);
  lr::strides3(value, s.value_stride);
  if (rows) {
    s.rows = static_cast<const int32_t*>(rows->data_ptr());
    for (int64_t b = 0; b < rows->size(0); ++b)
      STD_TORCH_CHECK(s.rows[b] >= -1 && s.rows[b] < s.r, "lr_kernels.multi_source_attention: rows[", i,
                      "]: expected -1 to ", s.r - 1, ", got ", s.rows[b]);
  }
  if (key_index) {
    s.key_index = static_cast<const int32_t*>(key_index->data_ptr());
    s.key_count = static_cast<const int32_t*>(key_count->data_ptr());
    for (int d = 0; d < 2; ++d) {
      s.index_stride[d] = lr::shared_stride(*key_index, d);
      s.count_stride[d] = lr::shared_stride(*key_count, d);
    }
  }
  if (value_index) {
    s.value_index = static_cast<const int32_t*>(value_index->data_ptr());
    const bool per_row = value_index->size(0) == 1 || value_index->size(0) == s.r;
    s.value_index_stride[per_row ? 0 : 1] = lr::shared_stride(*value_index, 0);
    for (int64_t row = 0; row < value_index->size(0); ++row)
      for (int64_t j = 0; j < s.m; ++j) {
        const int32_t token = s.value_index[row * value_index->stride(0) + j];
        STD_TORCH_CHECK(token >= 0 && token < s.v, "lr_kernels.multi_source_attention: value_index[", i,
                        "]: expected 0 to ", s.v - 1, ", got ", token);
      }
  }
  if (key_bias) {
    s.key_bias = static_cast<const float*>(key_bias->data_ptr());
    s.bias_stride = lr::shared_stride(*key_bias, 0);
  }
  s.logit_scale = lr::pointer_or_null<float>(logit_scale);
  s.logit_bias = lr::pointer_or_null<float>(logit_bias);
  for (int d = 0; d < 2; ++d) {
    if (logit_scale) s.logit_scale_stride[d] = logit_scale->stride(d);
    if (logit_bias) s.logit_bias_stride[d] = logit_bias->stride(d);
  }
  return s;
}

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

lr::AttentionParams attention_params(const Tensor& query, const Tensors& key, const Tensors& value,
                                     const MaybeTensors& rows, const MaybeTensors& key_index,
                                     const MaybeTensors& key_count, const MaybeTensors& value_index,
                                     const MaybeTensors& key_bias, const MaybeTensors& logit_scale,
                                     const MaybeTensors& logit_bias, const MaybeTensor& query_order,
                                     const MaybeTensor& class_start, double scale, const Tensor& out,
                                     const MaybeTensor& lse) {
  lr::AttentionParams p{};
  p.query = query.data_ptr();
  p.out = out.data_ptr();
  p.b = query.size(0);
  p.n = query.size(1);
  p.h = query.size(2);
  p.d = query.size(3);
  p.c = 1;
  lr::strides3(query, p.query_stride);
  lr::strides3(out, p.out_stride);
  if (lse) {
    p.lse = lse->data_ptr();
    p.lse_is_double = lse->scalar_type() == torch::headeronly::ScalarType::Double;
    lr::strides3(*lse, p.lse_stride);
  }
  if (query_order) {
    p.query_order = static_cast<const int32_t*>(query_order->data_ptr());
    p.class_start = static_cast<const int32_t*>(class_start->data_ptr());
    p.order_stride = lr::shared_stride(*query_order, 0);
    p.class_stride = lr::shared_stride(*class_start, 0);
    p.c = class_start->size(1) - 1;
  }
  p.sources = static_cast<int32_t>(key.size());
  STD_TORCH_CHECK(p.sources <= lr::kMaxSources, "lr_kernels.multi_source_attention: more than 16 sources");
  for (int32_t i = 0; i < p.sources; ++i)
    p.source[i] = source_params(i, key[i], value[i], rows[i], key_index[i], key_count[i], value_index[i], key_bias[i],
                                logit_scale[i], logit_bias[i]);
  p.softmax_groups = 1;
  p.dtype = lr::dtype_of(query);
  p.scale = static_cast<float>(scale);
  return p;
}

void multi_source_attention(Tensor query, Tensors key, Tensors value, MaybeTensors rows, MaybeTensors key_index,
                            MaybeTensors key_count, MaybeTensors value_index, MaybeTensors key_bias,
                            MaybeTensors logit_scale, MaybeTensors logit_bias, MaybeTensor query_order,
                            MaybeTensor class_start, std::vector<int64_t> softmax_group, MaybeTensors weight,
                            double scale, Tensor out, MaybeTensor lse) {
  lr::AttentionParams p = attention_params(query, key, value, rows, key_index, key_count, value_index, key_bias,
                                           logit_scale, logit_bias, query_order, class_start, scale, out, lse);
  p.softmax_groups = static_cast<int32_t>(weight.size());
  for (int32_t i = 0; i < p.sources; ++i) p.source[i].softmax_group = static_cast<int32_t>(softmax_group[i]);
  for (int32_t g = 0; g < p.softmax_groups; ++g) {
    p.weight[g] = lr::pointer_or_null<float>(weight[g]);
    for (int d = 0; weight[g] && d < 2; ++d) p.weight_stride[g][d] = weight[g]->stride(d);
  }
  lr::attention_cpu(p, lr::torch_parallel());
}

void multi_source_attention_backward(Tensor grad_out, MaybeTensor grad_lse, Tensor query, Tensors key, Tensors value,
                                     MaybeTensors rows, MaybeTensors key_index, MaybeTensors key_count,
                                     MaybeTensors value_index, MaybeTensors key_bias, MaybeTensors logit_scale,
                                     MaybeTensors logit_bias, MaybeTensor query_order, MaybeTensor class_start,
                                     double scale, Tensor out, Tensor lse, Tensor grad_query, Tensors grad_key,
                                     Tensors grad_value, Tensors grad_key_bias) {
  lr::AttentionBackwardParams p{};
  p.forward = attention_params(query, key, value, rows, key_index, key_count, value_index, key_bias, logit_scale,
                               logit_bias, query_order, class_start, scale, out, lse);
  STD_TORCH_CHECK(p.forward.lse_is_double, "lr_kernels.multi_source_attention: lse: expected float64");
  p.grad_out = grad_out.data_ptr();
  lr::strides3(grad_out, p.grad_out_stride);
  if (grad_lse) {
    p.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
    lr::strides3(*grad_lse, p.grad_lse_stride);
  }
  p.grad_query = grad_query.data_ptr();
  for (int32_t i = 0; i < p.forward.sources; ++i) {
    p.grad_key[i] = static_cast<float*>(grad_key[i].data_ptr());
    p.grad_value[i] = static_cast<float*>(grad_value[i].data_ptr());
    p.grad_key_bias[i] = grad_key_bias[i].numel() ? static_cast<float*>(grad_key_bias[i].data_ptr()) : nullptr;
  }
  lr::attention_backward_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("multi_source_attention_cpu", TORCH_BOX(&multi_source_attention));
  m.impl("multi_source_attention_backward_cpu", TORCH_BOX(&multi_source_attention_backward));
}

// For `python -m lr_kernels info`.
extern "C" __attribute__((visibility("default"))) const char* lr_kernels_isa() { return lr::isa(); }
