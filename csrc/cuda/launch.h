// What every CUDA launcher shares. A launcher takes a plain struct with its stream and returns null, or what went
// wrong.
#pragma once
#include <cuda_runtime.h>

namespace lr {

// After a launch: its error, which would otherwise surface in some later call.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lr
