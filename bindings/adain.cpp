// lr_kernels::adain_cpu: tensors -> AdainParams.
#include "cpu/adain.h"

#include <cmath>

#include "bindings.h"

namespace {

using lr::MaybeTensor;
using lr::one_or;
using lr::ScalarType;
using lr::Tensor;

lr::AdainTokens tokens(lr::Call& call, const lr::View& x, int64_t b, const MaybeTensor& mask, const char* name) {
  lr::AdainTokens t{};
  t.data = x.data;
  t.tokens = x.size[1];
  lr::copy_strides(x, t.stride);
  if (mask) {
    const lr::View table = call.input(*mask, name, ScalarType::Bool, {one_or(b), t.tokens}, 1);
    t.mask = table.as<uint8_t>();
    t.mask_stride = table.stride[0];
  }
  return t;
}

void adain(Tensor x, Tensor reference, MaybeTensor mask, MaybeTensor reference_mask, double eps, Tensor out) {
  lr::Call call("adain");
  const ScalarType dtype = call.floating(x, "x");
  const lr::View own = call.input(x, "x", dtype, {lr::kAny, lr::kAny, lr::kAny, lr::kAny}, 1);
  lr::AdainParams p{};
  p.b = own.size[0];
  p.h = own.size[2];
  p.d = own.size[3];
  const lr::View other = call.input(reference, "reference", dtype, {one_or(p.b), lr::kAny, p.h, p.d}, 1);
  p.x = tokens(call, own, p.b, mask, "mask");
  p.reference = tokens(call, other, p.b, reference_mask, "reference_mask");
  call.require(eps > 0 && std::isfinite(eps), "eps", eps, "a number above 0");
  const lr::View result = call.output(out, "out", dtype, {p.b, p.x.tokens, p.h, p.d}, 1);
  if (result.reach == 0) return;
  p.out = result.data;
  lr::copy_strides(result, p.out_stride);
  p.eps = eps;
  p.dtype = lr::dtype_of(dtype);
  lr::adain_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) { m.impl("adain_cpu", TORCH_BOX(&adain)); }
