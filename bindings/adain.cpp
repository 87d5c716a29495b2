// lr_kernels::adain_cpu: tensors -> AdainParams.
#include "cpu/adain.h"

#include "bindings.h"

namespace {

using lr::Tensor;
using MaybeTensor = std::optional<Tensor>;

lr::AdainTokens tokens(const Tensor& x, const MaybeTensor& mask) {
  lr::AdainTokens t{};
  t.data = x.data_ptr();
  t.tokens = x.size(1);
  lr::strides3(x, t.stride);
  t.stride[0] = lr::shared_stride(x, 0);
  t.mask = lr::pointer_or_null<uint8_t>(mask);
  if (mask) t.mask_stride = lr::shared_stride(*mask, 0);
  return t;
}

void adain(Tensor x, Tensor reference, MaybeTensor mask, MaybeTensor reference_mask, double eps, Tensor out) {
  lr::AdainParams p{};
  p.x = tokens(x, mask);
  p.reference = tokens(reference, reference_mask);
  p.out = out.data_ptr();
  p.b = x.size(0);
  p.h = x.size(2);
  p.d = x.size(3);
  lr::strides3(out, p.out_stride);
  p.eps = eps;
  p.dtype = lr::dtype_of(x);
  lr::adain_cpu(p, lr::torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lr_kernels, CPU, m) { m.impl("adain_cpu", TORCH_BOX(&adain)); }
