#include "cpu/attention.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(attention_kernel, const lr::AttentionParams&, const lr::Parallel&)
#if defined(__x86_64__)
namespace lr::amx {
void attention_kernel(const AttentionParams&, const Parallel&);
}
#endif

namespace lr {

void attention_cpu(const AttentionParams& params, const Parallel& parallel) {
#if defined(__x86_64__)
  if (params.dtype == DType::kBFloat16 && chosen_isa() == Isa::kAmx) return amx::attention_kernel(params, parallel);
#endif
  LR_CALL_CHOSEN(attention_kernel, params, parallel);
}

}  // namespace lr
