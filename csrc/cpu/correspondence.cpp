#include "cpu/correspondence.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(correspondence_kernel, const lr::CorrespondenceParams&, const lr::Parallel&)

namespace lr {

void correspondence_cpu(const CorrespondenceParams& params, const Parallel& parallel) {
  LR_CALL_CHOSEN(correspondence_kernel, params, parallel);
}

}  // namespace lr
