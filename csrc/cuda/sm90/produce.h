// The warpgroup that brings keys and values into shared memory, tile after tile of every work item's sources. TMA
// copies the tiles of dense sources; listed keys, and views that TMA cannot describe, are gathered row by row. So are
// 8-bit rows, which then become numbers where they lie.
#pragma once
#include "cuda/sm90/eight_bit.h"
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
  // Units of 8-bit rows that a lane reads before it stores numbers; more needs more registers.
  static constexpr int kLoads = kPasses * kUnits;
  static constexpr int kTogether = kLoads % 4 == 0 && C::Chunks % kLanes == 0 ? 4 : kLoads % 3 == 0 ? 3 : 2;
  static_assert(kRows <= 32 && kLanes >= C::Keys::Width && kLoads % kTogether == 0);

  const Problem& x;
  const Shared<C>& shared;
  const int lane, warp, unit;
  const int chunks = static_cast<int>(x.attention.d / 8);

  LR_DEVICE Producer(const Problem& problem, const Shared<C>& places, int thread)
      : x(problem), shared(places), lane(thread % 32), warp(thread / 32 % 4), unit(lane % kLanes) {}

  LR_DEVICE void run() {
    Ring<C::Stages> ring;
    for (int number = block_index(); number < x.works; number += grid_size()) {
      const Work<C> w(x, number, lane);
      for (int s = 0; s < x.attention.sources; ++s) {
        const int begin = shuffle(w.begin, s), stop = shuffle(w.stop, s), row = shuffle(w.row, s);
        if (begin >= stop) continue;
        const Storage storage = C::General ? x.attention.source[s].storage : Storage::kElements;
        const Producer me(x, shared, forget(thread_index()));
        if (storage == Storage::kElements)
          me.bring(ring, w, s, row, begin, stop);
        else if (storage == Storage::kInt8)
          me.template bring_eight_bit<Storage::kInt8>(ring, w, s, row, begin, stop);
        else
          me.template bring_eight_bit<Storage::kFloat8>(ring, w, s, row, begin, stop);
      }
    }
    copy_async_wait_all();
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

  // Copies the rows of this warp, Bytes of each to a unit of the tile. token: of the row `lane` of them; rows from
  // `left` on become zeros.
  template <int Bytes>
  LR_DEVICE void copy_rows(uint32_t tile, const char* from, int step, int token, int left) const {
#pragma unroll(kUnroll)
    for (int n = 0; n < kPasses; ++n) {
      const int r = lane / kLanes + 32 / kLanes * n, tile_row = warp * kRows + r;
      const char* of_row = from + wide_product(shuffle(token, r), step);
      if (kRows * kLanes % 32 && r >= kRows) continue;
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const int at = unit + k * kLanes;
        if (C::Chunks % kLanes && at >= C::Chunks) continue;
        copy_async<Bytes>(tile + C::Keys::place(tile_row, at), of_row + k * kLanes * Bytes,
                          tile_row < left && at < chunks);
      }
    }
  }

  // What a source's keys at places below `stop` have besides their channels. Of a tile, each lane asks for the row
  // `lane` of its warp's.
  struct Keys {
    const int32_t *list, *moved;
    const float* bias;
    float beta;
    int last, stop;  // last: value
    LR_DEVICE Keys(const Work<C>& w, const AttentionSource& source, int s, int row, int stop_at) : stop(stop_at) {
      list = source.key_index;
      if (list) list += w.c * source.index_stride[0] + row * source.index_stride[1];
      bias = C::General ? source.key_bias : nullptr;
      if (bias) bias += row * source.bias_stride;
      moved = C::General ? source.value_index : nullptr;
      if (moved) moved += row * source.value_index_stride[0] + w.b * source.value_index_stride[1];
      beta = C::General ? shuffle(w.beta, s) : 0;
      last = static_cast<int>(source.v) - 1;
    }
    LR_DEVICE int token(int place) const { return place >= stop ? 0 : list ? load_global(list + place) : place; }
    LR_DEVICE float shift(int token, bool exists) const {
      return bias && exists ? beta + load_global(bias + token) : beta;
    }
    LR_DEVICE int value(int token, bool exists) const {
      if (!moved) return token;
      const int entry = exists ? load_global(moved + token) : 0;
      return entry < 0 ? 0 : entry < last ? entry : last;
    }
  };
  LR_DEVICE void store_shift(int stage, float shift, bool exists) const {
    if (!C::General) return;
    if (lane < kRows) store_shared(shared.shift(stage, warp * kRows + lane), exists ? shift * kLog2e : -INFINITY);
    sync_warp();
    if (lane == 0) mbarrier_arrive(shared.full_key(stage));
  }

  LR_DEVICE void bring(Ring<C::Stages>& ring, const Work<C>& w, int s, int row, int begin, int stop) const {
    const AttentionSource& source = x.attention.source[s];
    const bool key_boxes = x.maps.keys >> s & 1, value_boxes = x.maps.values >> s & 1;
    const int head = w.h / source.heads_per_key_head;
    const auto* key = static_cast<const char*>(source.key) +
                      2 * (row * source.key_stride[0] + head * source.key_stride[2]) + 16 * unit;
    const auto* value = static_cast<const char*>(source.value) +
                        2 * (row * source.value_stride[0] + head * source.value_stride[2]) + 16 * unit;
    const int key_step = static_cast<int>(2 * source.key_stride[1]);
    const int value_step = static_cast<int>(2 * source.value_stride[1]);
    const Keys keys(w, source, s, row, stop);
    int ahead = keys.token(begin + warp * kRows + lane);  // a list's entries are loaded a tile ahead
    for (int start = begin; start < stop; start += C::BN) {
      const int token = ahead, left = stop - start;
      const bool exists = warp * kRows + lane < left;
      ahead = keys.token(start + C::BN + warp * kRows + lane);
      if (ring.round) mbarrier_wait(shared.empty_key(ring.stage), ring.round - 1, "empty_key");
      const float shift = keys.shift(token, exists);
      if (key_boxes) {
        copy_boxes(shared.key(ring.stage), &x.maps.key[s], head, start, row, shared.full_key(ring.stage));
      } else {
        copy_rows<16>(shared.key(ring.stage), key, key_step, token, left);
        copy_async_arrive(shared.full_key(ring.stage));
      }
      store_shift(ring.stage, shift, exists);
      if (ring.round) mbarrier_wait(shared.empty_value(ring.stage), ring.round - 1, "empty_value");
      if (value_boxes) {
        copy_boxes(shared.value(ring.stage), &x.maps.value[s], head, start, row, shared.full_value(ring.stage));
      } else {
        copy_rows<16>(shared.value(ring.stage), value, value_step, keys.value(token, exists), left);
        copy_async_arrive(shared.full_value(ring.stage));
      }
      ring.next();
    }
  }

  // ---- 8 bits

  // As bring. Keys and values take turns: while the copies of two turns are on their way, the bytes of the turn before
  // them become numbers. They came to the first half of the units that the numbers fill, and no other thread touches
  // these. What a turn needs of the source is read anew, since the registers are few.
  template <Storage S>
  LR_DEVICE void bring_eight_bit(Ring<C::Stages>& ring, const Work<C>& w, int s, int row, int begin, int stop) const {
    const Keys keys(w, x.attention.source[s], s, row, stop);
    int token = 0, ahead = keys.token(begin + warp * kRows + lane), behind = 0;  // behind: the stage before this one
    float scale[3] = {};  // of this warp's row `lane`: of this turn and of the two before
    for (int turn = 0, start = begin; start < stop + C::BN; ++turn) {
      const bool values = turn & 1, exists = start + warp * kRows + lane < stop;
      const auto tile = [&](int stage) { return values ? shared.value(stage) : shared.key(stage); };
      const Producer me(x, shared, forget(thread_index()));
      scale[2] = scale[1], scale[1] = scale[0];
      if (start < stop) {
        if (!values) token = ahead, ahead = keys.token(start + C::BN + warp * kRows + lane);
        if (ring.round)
          mbarrier_wait(values ? shared.empty_value(ring.stage) : shared.empty_key(ring.stage), ring.round - 1,
                        values ? "empty_value" : "empty_key");
        if (!values) store_shift(ring.stage, keys.shift(token, exists), exists);
        const int from = values ? keys.value(token, exists) : token;
        const AttentionSource& source = x.attention.source[forget(s)];
        const auto of_source = [&](const int64_t (&key)[3], const int64_t (&value)[3], int token) {
          const auto stride = [&](int i) { return values ? value[i] : key[i]; };
          return row * stride(0) + token * stride(1) + w.h / source.heads_per_key_head * stride(2);
        };
        const float* scales = values ? source.value_scale : source.key_scale;
        scale[0] =
            exists ? load_global(scales + of_source(source.key_scale_stride, source.value_scale_stride, from)) : 0;
        me.template copy_rows<8>(tile(ring.stage),
                                 static_cast<const char*>(values ? source.value : source.key) +
                                     of_source(source.key_stride, source.value_stride, 0) + 8 * unit,
                                 static_cast<int>(values ? source.value_stride[1] : source.key_stride[1]), from,
                                 stop - start);
      }
      copy_async_commit();
      if (turn > 1)
        me.template dequantize_rows<S>(tile(behind), scale[2],
                                       values ? shared.full_value(behind) : shared.full_key(behind));
      if (!values) continue;
      behind = ring.stage;
      if (start < stop) ring.next();
      start += C::BN;
    }
  }

  // The bytes that this thread has copied two turns ago become numbers. scale: of the row `lane`.
  template <Storage S>
  LR_DEVICE void dequantize_rows(uint32_t tile, float scale, uint32_t barrier) const {
    copy_async_wait<2>();
#pragma unroll 1
    for (int first = 0; first < kLoads; first += kTogether) {
      uint64_t bits[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (const Place at(*this, first + i); at.exists) load_shared(tile + at.offset, bits[i]);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const Place at(*this, first + i);
        const float of_row = shuffle(scale, at.row);
        uint32_t numbers[4];
        dequantize<C::Half, S>(bits[i], of_row, numbers);
        if (at.exists) store_shared(tile + at.offset, numbers);
      }
    }
    mbarrier_arrive(barrier);
  }
  // The unit of a tile that is the i-th of this lane.
  struct Place {
    int row;  // of this warp's
    uint32_t offset;
    bool exists;
    LR_DEVICE Place(const Producer& me, int i) {
      const int at = me.unit + i % kUnits * kLanes;
      row = me.lane / kLanes + 32 / kLanes * (i / kUnits);
      exists = (kRows * kLanes % 32 == 0 || row < kRows) && (C::Chunks % kLanes == 0 || at < C::Chunks);
      offset = C::Keys::place(me.warp * kRows + row, at);
    }
  };
};

}  // namespace lr::sm90
