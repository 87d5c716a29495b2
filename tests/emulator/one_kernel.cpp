// One configuration of the kernels on the emulator, in place of all those of its head_dim: for planted faults, each of
// which is compiled anew.
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/launch.h"

namespace lr::sm90 {

using C = ConfigOf<LR_HEAD_DIM, false, Kind::LR_KIND>;

template <>
KeyTile key_tile<LR_HEAD_DIM>(Kind) {
  return {C::BN, C::Keys::Width * 8, C::Swizzle};
}

template <>
const char* run<LR_HEAD_DIM>(const Problem& x, Kind, int multiprocessors, cudaStream_t) {
  std::atomic<uint64_t> allowed{0};
  const int grid = blocks_of(x.works, multiprocessors);
  launch(attention_kernel<C>, allowed, {grid, C::Threads, C::SharedBytes, C::LaunchRegisters, nullptr}, x);
  if (x.parts > 1) launch(merge_parts_kernel<C>, allowed, {4, kMergeThreads, 0, 32, nullptr}, x);
  return nullptr;
}

}  // namespace lr::sm90
