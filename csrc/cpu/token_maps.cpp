#include "cpu/token_maps.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(token_maps_kernel, const lr::TokenMapsParams&, const lr::Parallel&)

namespace lr {

void token_maps_cpu(const TokenMapsParams& params, const Parallel& parallel) {
  LR_CALL_CHOSEN(token_maps_kernel, params, parallel);
}

}  // namespace lr
