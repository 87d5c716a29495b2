// correspondence on the CPU, in fp32: blocks of both token sets, with the best of each token so far. Scratch: 8 * m *
// (b
// + b or 1) bytes for both rows of the reference or one; per thread 384 KiB of targets (at least 128 * c bytes) and
// 288 * c bytes.
#pragma once
#include "params.h"

namespace lr {

void correspondence_cpu(const CorrespondenceParams& params, const Parallel& parallel);

}  // namespace lr
