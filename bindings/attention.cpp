// lr_kernels::multi_source_attention_cpu: tensors -> AttentionParams.
#include "cpu/attention.h"

#include "bindings.h"
#include "cpu/dispatch.h"

namespace {

using lr::Tensor;
using MaybeTensor = std::optional<Tensor>;

lr::AttentionSource source_params(int64_t i, const Tensor& key, const Tensor& value, const MaybeTensor& rows,
                                  const MaybeTensor& key_index, const MaybeTensor& key_count,
                                  const MaybeTensor& key_bias, const MaybeTensor& logit_scale,
                                  const MaybeTensor& logit_bias) {
  lr::AttentionSource s{};
  s.key = key.data_ptr();
  s.value = value.data_ptr();
  s.r = key.size(0);
  s.m = key.size(1);
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

void multi_source_attention(Tensor query, std::vector<Tensor> key, std::vector<Tensor> value,
                            std::vector<MaybeTensor> rows, std::vector<MaybeTensor> key_index,
                            std::vector<MaybeTensor> key_count, std::vector<MaybeTensor> key_bias,
                            std::vector<MaybeTensor> logit_scale, std::vector<MaybeTensor> logit_bias,
                            MaybeTensor query_order, MaybeTensor class_start, double scale, Tensor out,
                            MaybeTensor lse) {
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
    p.lse = static_cast<float*>(lse->data_ptr());
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
    p.source[i] = source_params(i, key[i], value[i], rows[i], key_index[i], key_count[i], key_bias[i], logit_scale[i],
                                logit_bias[i]);
  p.dtype = lr::dtype_of(query);
  p.scale = static_cast<float>(scale);
  lr::attention_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("multi_source_attention_cpu", TORCH_BOX(&multi_source_attention));
}

// For `python -m lr_kernels info`.
extern "C" __attribute__((visibility("default"))) const char* lr_kernels_isa() { return lr::isa(); }
