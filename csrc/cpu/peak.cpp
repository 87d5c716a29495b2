#include "cpu/peak.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(peak_kernel, bool bf16, int64_t rounds, const lr::Parallel&, double& operations)
#if defined(__x86_64__)
namespace lr::amx {
void peak_kernel(bool bf16, int64_t rounds, const Parallel&, double& operations);
}
#endif

namespace lr {
namespace {

void run(bool bf16, int64_t rounds, const Parallel& parallel, double& operations) {
#if defined(__x86_64__)
  if (bf16 && chosen_isa() == Isa::kAmx) return amx::peak_kernel(bf16, rounds, parallel, operations);
#endif
  LR_CALL_CHOSEN(peak_kernel, bf16, rounds, parallel, operations);
}

}  // namespace

double peak_cpu(bool bf16, int64_t rounds, const Parallel& parallel) {
  double operations = 0;
  run(bf16, rounds, parallel, operations);
  return operations;
}

}  // namespace lr
