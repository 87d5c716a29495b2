// lr_kernels::adain_cpu: tensors -> AdainParams.
#include <cmath>

#include "bindings.h"
#include "cpu/kernels.h"

namespace lr {
namespace {

AdainTokens tokens(Call& call, const View& x, int64_t b, const MaybeTensor& mask, const char* name) {
  AdainTokens t{};
  t.data = x.data;
  t.tokens = x.size[1];
  copy_strides(x, t.stride);
  if (mask) {
    const View table = call.input(*mask, name, ScalarType::Bool, {one_or(b), t.tokens}, 1);
    t.mask = table.as<uint8_t>();
    t.mask_stride = table.stride[0];
  }
  return t;
}

void adain(Tensor x, Tensor reference, MaybeTensor mask, MaybeTensor reference_mask, double eps, Tensor out) {
  Call call("adain");
  const ScalarType dtype = call.floating(x, "x");
  const View own = call.input(x, "x", dtype, {kAny, kAny, kAny, kAny}, 1);
  AdainParams p{};
  p.b = own.size[0];
  p.h = own.size[2];
  p.d = own.size[3];
  const View other = call.input(reference, "reference", dtype, {one_or(p.b), kAny, p.h, p.d}, 1);
  p.x = tokens(call, own, p.b, mask, "mask");
  p.reference = tokens(call, other, p.b, reference_mask, "reference_mask");
  call.require(eps > 0 && std::isfinite(eps), "eps", eps, "a number above 0");
  const View result = call.output(out, "out", dtype, {p.b, p.x.tokens, p.h, p.d}, 1);
  if (result.reach == 0) return;
  p.out = result.data;
  copy_strides(result, p.out_stride);
  p.eps = eps;
  p.dtype = dtype_of(dtype);
  adain_cpu(p, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) { m.impl("adain_cpu", TORCH_BOX(&adain)); }

}  // namespace lr
