#include "cpu/adain.h"

#include "cpu/dispatch.h"

LR_DECLARE_PER_ISA(adain_kernel, const lr::AdainParams&, const lr::Parallel&)

namespace lr {

void adain_cpu(const AdainParams& params, const Parallel& parallel) { LR_CALL_CHOSEN(adain_kernel, params, parallel); }

}  // namespace lr
