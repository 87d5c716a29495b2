#pragma once
#include <cuda_runtime.h>

#include "params.h"

namespace lr {

struct StepBlendCudaParams {
  StepBlendParams blend;            // coefficients: of the first step
  const int32_t* step;              // [1] on the device, or null: `row`
  int64_t row, steps;               // a step outside [0, steps) gives NaN
  int64_t coefficient_step_stride;  // from one step's coefficients to the next
  cudaStream_t stream;
};

// Null, or the error of the launch.
const char* step_blend_cuda(const StepBlendCudaParams& p);

}  // namespace lr
