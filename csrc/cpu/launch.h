// How a kernel starts: with the type of its elements, and on as many threads as its work is worth.
#pragma once
#include "cpu/simd.h"
#include "params.h"

namespace lr::LR_ISA {
namespace {

// call(x), where x has the type of the elements.
template <class Call>
auto with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat16:
      return call(Float16{});
    case DType::kBFloat16:
      return call(BFloat16{});
    case DType::kFloat32:
      break;
  }
  return call(float{});
}

// worker(context, i) for i in [0, items); on the caller's thread alone where waking another costs more than it saves.
inline void run_items(const Parallel& parallel, int64_t items, bool alone, void (*worker)(void* context, int64_t i),
                      void* context) {
  if (!alone && parallel.threads > 1) return parallel.run(items, worker, context);
  for (int64_t i = 0; i < items; ++i) worker(context, i);
}

}  // namespace
}  // namespace lr::LR_ISA
