// lr_kernels::attention_with_token_maps_cpu: tensors -> TokenMapsParams.
#include "cpu/token_maps.h"

#include "bindings.h"

namespace {

using lr::Tensor;

void attention_with_token_maps(Tensor query, Tensor key, Tensor value, Tensor token_indices, double scale, Tensor out,
                               Tensor maps) {
  lr::TokenMapsParams p{};
  p.query = query.data_ptr();
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.token_indices = static_cast<const int32_t*>(token_indices.data_ptr());
  p.out = out.data_ptr();
  p.maps = static_cast<float*>(maps.data_ptr());
  p.b = query.size(0);
  p.n = query.size(1);
  p.m = key.size(1);
  p.h = query.size(2);
  p.d = query.size(3);
  p.t = token_indices.size(1);
  lr::strides3(query, p.query_stride);
  lr::strides3(key, p.key_stride);
  lr::strides3(value, p.value_stride);
  lr::strides3(out, p.out_stride);
  p.token_stride = lr::shared_stride(token_indices, 0);
  p.dtype = lr::dtype_of(query);
  p.scale = static_cast<float>(scale);
  for (int64_t b = 0; b < token_indices.size(0); ++b)
    for (int64_t t = 0; t < p.t; ++t) {
      const int32_t index = p.token_indices[b * p.token_stride + t];
      STD_TORCH_CHECK(index >= 0 && index < p.m, "lr_kernels.attention_with_token_maps: token_indices: expected 0 to ",
                      p.m - 1, ", got ", index);
    }
  lr::token_maps_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) {
  m.impl("attention_with_token_maps_cpu", TORCH_BOX(&attention_with_token_maps));
}
