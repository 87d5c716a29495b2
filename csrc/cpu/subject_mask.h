// subject_mask on the CPU, in double. Scratch per row: 8 * (h * w + 2 * out_h * out_w) bytes.
#pragma once
#include "params.h"

namespace lr {

void subject_mask_cpu(const SubjectMaskParams& params, const Parallel& parallel);

}  // namespace lr
