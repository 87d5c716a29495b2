// The kernels of attention for Hopper.
#pragma once
#include "cuda/sm90/consume.h"
#include "cuda/sm90/produce.h"

namespace lr::sm90 {

// Blocks take work items in turn, as many blocks as there are multiprocessors.
template <class C>
LR_KERNEL(C::Threads)
attention_kernel(LR_PARAMETER Problem x) {
  const Shared<C> shared;
  const int thread = thread_index();
  if (thread == 0) {
    for (int i = 0; i < C::Stages; ++i) {
      mbarrier_init(shared.full_key(i), C::General ? 128 + 4 : 128);
      mbarrier_init(shared.full_value(i), 128);
      mbarrier_init(shared.empty_key(i), 4 * C::Consumers);
      mbarrier_init(shared.empty_value(i), 4 * C::Consumers);
    }
    fence_mbarrier_init();
  }
  if (C::Chunks < C::Keys::Units) {  // the channels that fill a step up stay zero
    for (int i = thread; i < C::Stages * C::BN; i += C::Threads)
      store_zero16(shared.key(i / C::BN) + C::Keys::place(i % C::BN, C::Chunks));
    fence_async();  // TMA may write there next
  }
  sync_block();
  if (thread / 128 == C::Consumers) {
    fewer_registers<C::ProducerRegisters>();
    Producer<C>(x, shared, thread).run();
  } else {
    more_registers<C::ConsumerRegisters>();
    Consumer<C>(x, shared).run();
  }
}

constexpr int kMergeThreads = 128;

// The exact attention over all keys from that over each part of them. A warp takes one query of one head.
template <class C>
LR_KERNEL(kMergeThreads)
merge_parts_kernel(LR_PARAMETER Problem x) {
  const AttentionParams& p = x.attention;
  const int lane = thread_index() % 32;
  const int64_t cells = p.b * p.n * p.h, warps = int64_t(grid_size()) * (kMergeThreads / 32);
  for (int64_t cell = block_index() * (kMergeThreads / 32) + thread_index() / 32; cell < cells; cell += warps) {
    const double* sums = x.part_sums + 2 * cell;
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < x.parts; ++i)  // a part without keys has no largest logit
      if (!(load_global(sums + 2 * i * cells + 1) == 0)) top = fmax(top, load_global(sums + 2 * i * cells));
    const auto weight = [&](int i) -> float {  // of all keys of part i, the largest logit having weight 1
      const double mine = load_global(sums + 2 * i * cells + 1);
      if (mine == 0) return 0;
      return float(mine) * exp2_fast(float((load_global(sums + 2 * i * cells) - top) * double(kLog2e)));
    };
    for (int i = 0; i < x.parts; ++i) sum += double(weight(i));
    const float factor = sum == 0 ? 0 : float(1 / sum);
    const int h = int(cell % p.h), b = int(cell / p.h / p.n);
    const int64_t query = cell / p.h % p.n;
    auto* out = static_cast<uint16_t*>(p.out) + b * p.out_stride[0] + query * p.out_stride[1] + h * p.out_stride[2];
    for (int channel = lane; channel < p.d; channel += 32) {
      float y = 0;
      for (int i = 0; i < x.parts; ++i)
        y = fmaf(load_global(x.part_out + (i * cells + cell) * C::D + channel), weight(i) * factor, y);
      store_global(out + channel, uint16_t(pack<C::Half>(y, 0)));
    }
    if (lane == 0) store_lse(p, b, query, h, top, sum);
  }
}

}  // namespace lr::sm90
