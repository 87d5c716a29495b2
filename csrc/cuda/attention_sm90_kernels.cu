// The kernels of attention for Hopper with LR_HEAD_DIM channels: fp16 and bf16, plain and general.
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/launch.h"

namespace lr::sm90 {
namespace {

template <class C>
const char* run_config(const Problem& x, int multiprocessors, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0}, none{0};
  const Launch attention{blocks_of(x.works, multiprocessors), C::Threads, C::SharedBytes, C::LaunchRegisters, stream};
  if (const char* error = launch(attention_kernel<C>, allowed, attention, x)) return error;
  if (x.parts == 1) return nullptr;
  const AttentionParams& p = x.attention;
  const int64_t cells = p.b * p.n * p.h, blocks = (cells + kMergeThreads / 32 - 1) / (kMergeThreads / 32);
  const int64_t most = int64_t(multiprocessors) * 16;  // as many warps as a multiprocessor holds
  const Launch merge{int(blocks < most ? blocks : most), kMergeThreads, 0, 32, stream};
  return launch(merge_parts_kernel<C>, none, merge, x);
}

template <int D, Kind K>
const char* run_kind(const Problem& x, int multiprocessors, cudaStream_t stream) {
  if (x.attention.dtype == DType::kFloat16) return run_config<ConfigOf<D, true, K>>(x, multiprocessors, stream);
  return run_config<ConfigOf<D, false, K>>(x, multiprocessors, stream);
}

template <class C>
constexpr KeyTile tile_of() {
  return {C::BN, C::Keys::Width * 8, C::Swizzle};
}

}  // namespace

template <int D>
KeyTile key_tile(Kind kind) {
  return kind == Kind::kPlain ? tile_of<ConfigOf<D, false, Kind::kPlain>>()
                              : tile_of<ConfigOf<D, false, Kind::kGeneral>>();
}

template <int D>
const char* run(const Problem& x, Kind kind, int multiprocessors, cudaStream_t stream) {
  return kind == Kind::kPlain ? run_kind<D, Kind::kPlain>(x, multiprocessors, stream)
                              : run_kind<D, Kind::kGeneral>(x, multiprocessors, stream);
}

template KeyTile key_tile<LR_HEAD_DIM>(Kind);
template const char* run<LR_HEAD_DIM>(const Problem&, Kind, int, cudaStream_t);

}  // namespace lr::sm90
