// The warpgroup that brings keys and values into shared memory, tile after tile of every work item's sources. TMA
// copies the tiles of dense sources; listed keys, and views that TMA cannot describe, are gathered row by row.
#pragma once
#include "cuda/sm90/work.h"

namespace lr::sm90 {

template <class C>
struct Producer {
  static constexpr int kRows = C::BN / 4;  // of a tile, for each of the four warps
  static constexpr int kPower = C::Chunks & -C::Chunks;
  static constexpr int kLanes = kPower == 1 ? 8 : kPower < 16 ? kPower : 16;  // that copy a row together
  static constexpr int kUnits = (C::Chunks + kLanes - 1) / kLanes;            // of 16 bytes of a row, for each of them
  static constexpr int kPasses = (kRows * kLanes + 31) / 32;                  // over the rows
  static constexpr int kUnroll = kPasses * kUnits <= 10 ? kPasses : kUnits == 1 ? 8 : 1;  // more needs more registers
  static_assert(kRows <= 32 && kLanes >= C::Keys::Width);

  const Problem& x;
  const Shared<C>& shared;
  const int lane = thread_index() % 32, warp = thread_index() / 32 % 4, unit = lane % kLanes;
  const int chunks = static_cast<int>(x.attention.d / 8);

  LR_DEVICE Producer(const Problem& problem, const Shared<C>& places) : x(problem), shared(places) {}

  LR_DEVICE void run() {
    Ring<C::Stages> ring;
    for (int number = block_index(); number < x.works; number += grid_size()) {
      const Work<C> w(x, number, lane);
      for (int s = 0; s < x.attention.sources; ++s) {
        const int begin = shuffle(w.begin, s), stop = shuffle(w.stop, s), row = shuffle(w.row, s);
        if (begin < stop) bring(ring, w, s, row, begin, stop);
      }
    }
    copy_async_wait();
  }

 private:
  // One thread has TMA copy a tile, and arrives for all.
  LR_DEVICE void copy_boxes(uint32_t tile, const TensorMap* map, int h, int start, int row, uint32_t barrier) const {
    if (thread_index() % 128 == 0) {
      mbarrier_arrive_expect(barrier, C::Keys::Bytes);
      mbarrier_arrive(barrier, 127);
      for (int i = 0; i < C::Keys::Columns; ++i)
        load_box(tile + i * C::Keys::Column, map, i * C::Keys::Width * 8, h, start, row, barrier);
    }
  }

  // Copies the rows of this warp. token: of the row `lane` of them; rows from `left` on become zeros.
  LR_DEVICE void copy_rows(uint32_t tile, const char* from, int step, int token, int left, uint32_t barrier) const {
#pragma unroll(kUnroll)
    for (int n = 0; n < kPasses; ++n) {
      const int r = lane / kLanes + 32 / kLanes * n, tile_row = warp * kRows + r;
      const char* of_row = from + wide_product(shuffle(token, r), step);
      if (kRows * kLanes % 32 && r >= kRows) continue;
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const int at = unit + k * kLanes;
        if (C::Chunks % kLanes && at >= C::Chunks) continue;
        copy_async(tile + C::Keys::place(tile_row, at), of_row + k * kLanes * 16, tile_row < left && at < chunks);
      }
    }
    copy_async_arrive(barrier);
  }

  LR_DEVICE void bring(Ring<C::Stages>& ring, const Work<C>& w, int s, int row, int begin, int stop) const {
    const AttentionSource& source = x.attention.source[s];
    const bool key_boxes = x.maps.keys >> s & 1, value_boxes = x.maps.values >> s & 1;
    const auto* key = static_cast<const char*>(source.key) +
                      2 * (row * source.key_stride[0] + w.h * source.key_stride[2]) + 16 * unit;
    const auto* value = static_cast<const char*>(source.value) +
                        2 * (row * source.value_stride[0] + w.h * source.value_stride[2]) + 16 * unit;
    const int key_step = static_cast<int>(2 * source.key_stride[1]);
    const int value_step = static_cast<int>(2 * source.value_stride[1]);
    const int32_t* list = source.key_index;
    if (list) list += w.c * source.index_stride[0] + row * source.index_stride[1];
    const float* bias = C::General ? source.key_bias : nullptr;
    if (bias) bias += row * source.bias_stride;
    const int32_t* moved = C::General ? source.value_index : nullptr;
    if (moved) moved += row * source.value_index_stride[0] + w.b * source.value_index_stride[1];
    const float beta = C::General ? shuffle(w.beta, s) : 0;

    // Of row `lane` of this warp's rows; a list's entries are loaded a tile ahead
    const auto token_of = [&](int start) {
      const int place = start + warp * kRows + lane;
      return place >= stop ? 0 : list ? load_global(list + place) : place;
    };
    int ahead = token_of(begin);
    for (int start = begin; start < stop; start += C::BN) {
      const int token = ahead, left = stop - start;
      const bool exists = warp * kRows + lane < left;
      ahead = token_of(start + C::BN);
      if (ring.round) mbarrier_wait(shared.empty_key(ring.stage), ring.round - 1, "empty_key");
      float shift = beta;
      if (bias && exists) shift += load_global(bias + token);
      if (key_boxes)
        copy_boxes(shared.key(ring.stage), &x.maps.key[s], w.h, start, row, shared.full_key(ring.stage));
      else
        copy_rows(shared.key(ring.stage), key, key_step, token, left, shared.full_key(ring.stage));
      if (C::General) {
        if (lane < kRows)
          store_shared(shared.shift(ring.stage, warp * kRows + lane), exists ? shift * kLog2e : -INFINITY);
        sync_warp();
        if (lane == 0) mbarrier_arrive(shared.full_key(ring.stage));
      }
      if (ring.round) mbarrier_wait(shared.empty_value(ring.stage), ring.round - 1, "empty_value");
      if (value_boxes) {
        copy_boxes(shared.value(ring.stage), &x.maps.value[s], w.h, start, row, shared.full_value(ring.stage));
      } else {
        int from = token;
        if (moved) {
          const int last = static_cast<int>(source.v) - 1, entry = exists ? load_global(moved + token) : 0;
          from = entry < 0 ? 0 : entry < last ? entry : last;
        }
        copy_rows(shared.value(ring.stage), value, value_step, from, left, shared.full_value(ring.stage));
      }
      ring.next();
    }
  }
};

}  // namespace lr::sm90
