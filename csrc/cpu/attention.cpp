#include "cpu/attention.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(attention_kernel, const lr::AttentionParams&, const lr::Parallel&)

namespace lr {

void attention_cpu(const AttentionParams& params, const Parallel& parallel) {
  LR_CALL_CHOSEN(attention_kernel, params, parallel);
}

}  // namespace lr
