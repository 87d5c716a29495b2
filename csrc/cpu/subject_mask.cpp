#include "cpu/subject_mask.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(subject_mask_kernel, const lr::SubjectMaskParams&, const lr::Parallel&)

namespace lr {

void subject_mask_cpu(const SubjectMaskParams& params, const Parallel& parallel) {
  LR_CALL_CHOSEN(subject_mask_kernel, params, parallel);
}

}  // namespace lr
