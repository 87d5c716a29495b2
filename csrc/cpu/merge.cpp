#include "cpu/merge.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(merge_kernel, const lr::MergeParams&, const lr::Parallel&)

namespace lr {

void merge_cpu(const MergeParams& params, const Parallel& parallel) { LR_CALL_CHOSEN(merge_kernel, params, parallel); }

}  // namespace lr
