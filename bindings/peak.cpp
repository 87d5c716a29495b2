// For benchmarks: lr_kernels.info.arithmetic_peak.
#include "bindings.h"
#include "cpu/kernels.h"

extern "C" __attribute__((visibility("default"))) double lr_kernels_peak(bool bf16, int64_t rounds) {
  double operations = 0;
  lr::peak_cpu({rounds, bf16, &operations}, lr::torch_parallel());
  return operations;
}
