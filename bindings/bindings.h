// What every binding shares: torch's thread pool as lr::Parallel, dtypes, the checks of arguments. Torch's stable ABI
// only.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "arguments.h"
#include "library.h"
#include "params.h"

namespace lr {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// torch's own threads: obeys torch.set_num_threads and runs serially inside another parallel region.
inline Parallel torch_parallel() {
  return Parallel{static_cast<int32_t>(torch::stable::get_num_threads()),
                  [](int64_t count, void (*worker)(void*, int64_t), void* context) {
                    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) worker(context, i);
                    });
                  }};
}

// Of what Call::floating lets through.
inline DType dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? DType::kFloat32 : dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

}  // namespace lr
