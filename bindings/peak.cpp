// For benchmarks: lr_kernels.info.arithmetic_peak.
#include "cpu/peak.h"

#include "bindings.h"

extern "C" __attribute__((visibility("default"))) double lr_kernels_peak(bool bf16, int64_t rounds) {
  return lr::peak_cpu(bf16, rounds, lr::torch_parallel());
}
