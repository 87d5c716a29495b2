// lr_kernels::correspondence_cpu: tensors -> CorrespondenceParams.
#include "bindings.h"
#include "cpu/kernels.h"

namespace lr {
namespace {

constexpr int64_t kMaxChannels = 1 << 24;  // the kernel counts the channels of a slice of targets in 32 bits

void correspondence(Tensor target, Tensor reference, int64_t columns, Tensor radius_squared, Tensor index,
                    Tensor consistent) {
  Call call("correspondence");
  const ScalarType dtype = call.floating(target, "target");
  const View targets = call.input(target, "target", dtype, {kAny, kAny, kAny}, 1);
  CorrespondenceParams p{};
  p.b = targets.size[0];
  p.n = targets.size[1];
  p.c = targets.size[2];
  const View references = call.input(reference, "reference", dtype, {one_or(p.b), kAny, p.c}, 1);
  p.m = references.size[1];
  call.require(p.n <= kMaxTokens, "target", p.n, "at most ", kMaxTokens, " tokens");
  call.require(p.m >= 1 && p.m <= kMaxTokens, "reference", p.m, "1 to ", kMaxTokens, " tokens");
  call.require(p.c >= 1 && p.c <= kMaxChannels, "target", p.c, "1 to ", kMaxChannels, " channels");
  call.require(columns >= 1, "columns", columns, "at least 1");
  const View radii = call.input(radius_squared, "radius_squared", ScalarType::Long, {one_or(p.b)}, 1);
  for (int64_t b = 0; b < radii.size[0] && radii.reach > 0; ++b) {
    const int64_t square = radii.as<int64_t>()[b * radii.stride[0]];
    call.require(square >= 0, "radius_squared", square, "numbers of at least 0");
  }
  const View found = call.output(index, "index", ScalarType::Long, {p.b, p.n}, 2);
  const View agrees = call.output(consistent, "consistent", ScalarType::Bool, {p.b, p.n}, 2);
  if (found.reach == 0) return;
  p.target = targets.data;
  p.reference = references.data;
  p.radius_squared = radii.as<int64_t>();
  p.index = found.as<int64_t>();
  p.consistent = agrees.as<uint8_t>();
  copy_strides(targets, p.target_stride);
  copy_strides(references, p.reference_stride);
  p.radius_stride = radii.stride[0];
  p.columns = columns;
  p.dtype = dtype_of(dtype);
  correspondence_cpu(p, torch_parallel());
}

}  // namespace

LR_LIBRARY_IMPL(CPU, m) { m.impl("correspondence_cpu", TORCH_BOX(&correspondence)); }

}  // namespace lr
