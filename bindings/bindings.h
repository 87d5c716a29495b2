// What every binding shares: torch's thread pool as lr::Parallel, dtypes, strides. Torch's stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "params.h"

namespace lr {

using torch::stable::Tensor;

// torch's own threads: obeys torch.set_num_threads and runs serially inside another parallel region.
inline Parallel torch_parallel() {
  return Parallel{static_cast<int32_t>(torch::stable::get_num_threads()),
                  [](int64_t count, void (*worker)(void*, int64_t), void* context) {
                    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) worker(context, i);
                    });
                  }};
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "lr_kernels: expected float32, float16 or bfloat16");
  }
}

// Element strides of the first three dimensions.
inline void strides3(const Tensor& x, int64_t (&out)[3]) {
  for (int i = 0; i < 3; ++i) out[i] = x.stride(i);
}

// Stride of a dimension that may have size 1 and is then shared: 0.
inline int64_t shared_stride(const Tensor& x, int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

template <class T>
const T* pointer_or_null(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

}  // namespace lr
