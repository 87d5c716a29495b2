// attention_with_token_maps on the CPU, exact softmax in fp32. Scratch per thread, in floats: 32 * (m + 2 * d) + 128 *
// t, and 2 * m * d for 16-bit dtypes.
#pragma once
#include "params.h"

namespace lr {

void token_maps_cpu(const TokenMapsParams& params, const Parallel& parallel);

}  // namespace lr
