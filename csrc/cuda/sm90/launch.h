// The launches of attention for Hopper for one number of channels. attention_sm90_kernels.cu is compiled once for each,
// with LR_HEAD_DIM, and has the definitions.
#pragma once
#include "cuda/sm90/work.h"

namespace lr::sm90 {

// A tile of keys, which depends on the kind of call.
struct KeyTile {
  int keys, channels, swizzle;  // channels: of a column, a box of TMA
};

template <int D>
KeyTile key_tile(Kind kind);

// Blocks of a launch: one for each multiprocessor, as long as there is work.
inline int blocks_of(int64_t works, int multiprocessors) {
  return works < multiprocessors ? static_cast<int>(works) : multiprocessors;
}

// Null, or the error of a launch. channels of x.maps and works fit key_tile<D>(kind).
template <int D>
const char* run(const Problem& x, Kind kind, int multiprocessors, cudaStream_t stream);

}  // namespace lr::sm90
