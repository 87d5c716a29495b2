#include "cpu/attention_backward.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(attention_backward_kernel, const lr::AttentionBackwardParams&, const lr::Parallel&)

namespace lr {

void attention_backward_cpu(const AttentionBackwardParams& params, const Parallel& parallel) {
  LR_CALL_CHOSEN(attention_backward_kernel, params, parallel);
}

}  // namespace lr
