// Turns masks into lists of visible keys on the GPU, so that the host need not wait for the masks. A thread block makes
// one list.
#include "cuda/compact_keys.h"
#include "cuda/launch.h"

namespace lr {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// Sum of `x` over the lanes before this one.
__device__ int lanes_before(int x, int lane) {
  int sum = x;
#pragma unroll
  for (int shift = 1; shift < 32; shift *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, shift);
    if (lane >= shift) sum += other;
  }
  return sum - x;
}

__global__ void __launch_bounds__(kThreads) compact_keys_kernel(const __grid_constant__ CompactKeysParams p) {
  __shared__ int of_warp[kWarps];
  const int64_t list = blockIdx.x, c = list / p.r, r = list % p.r;
  const uint8_t* mask = p.mask ? p.mask + r * p.mask_stride : nullptr;
  const uint8_t* groups = p.groups ? p.groups + r * p.groups_stride : nullptr;
  int32_t* index = p.index + list * p.m;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int total = 0;
  for (int64_t start = 0; start < p.m; start += kThreads) {
    const int64_t j = start + threadIdx.x;
    const bool seen = j < p.m && (!mask || mask[j]) && (!groups || (groups[j] & p.classes[c]));
    const unsigned votes = __ballot_sync(0xffffffffu, seen);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    const int mine = of_warp[lane];  // every warp sums the counts of all
    const int before = lanes_before(mine, lane);
    const int place = total + __shfl_sync(0xffffffffu, before, warp) + __popc(votes & ((1u << lane) - 1));
    if (seen) index[place] = static_cast<int32_t>(j);
    total += __shfl_sync(0xffffffffu, before + mine, 31);
    __syncthreads();
  }
  for (int64_t j = total + threadIdx.x; j < p.m; j += kThreads) index[j] = 0;
  if (threadIdx.x == 0) p.count[list] = total;
}

}  // namespace

const char* compact_keys_cuda(const CompactKeysParams& p) {
  const int64_t lists = p.c * p.r;
  if (lists == 0) return nullptr;
  if (lists > 0x7fffffff) return "more than 2147483647 lists";
  compact_keys_kernel<<<static_cast<unsigned>(lists), kThreads, 0, p.stream>>>(p);
  return launch_error();
}

}  // namespace lr
