// The warpgroups that multiply: each takes 64 queries of a work item and walks over the tiles that the producer brings.
#pragma once
#include "cuda/sm90/precise.h"

namespace lr::sm90 {

// Logits in log2 units from here on are an fp32 number whose neighbours are 32 apart, and weights have no meaning.
constexpr float kFar = 268435456.0f;

// A thread's two rows of a running softmax, in log2 units: g and g + 8 of its warp's 16 queries, g = lane / 4.
struct Softmax {
  float top[2] = {-kMax, -kMax}, sum[2] = {0, 0}, shrink[2];  // shrink: what the sums so far are multiplied with

  // The scores of a tile become weights. Only the first `valid` of its keys exist.
  template <int BN>
  LR_DEVICE void add(float (&s)[BN / 2], int valid, float scale) {
    if (valid < BN) {
      const int column = thread_index() % 4 * 2;
#pragma unroll
      for (int i = 0; i < BN / 2; ++i)
        if (i / 4 * 8 + i % 2 + column >= valid) s[i] = -INFINITY;
    }
    weigh<BN>(s, scale);
  }

  // The same where the logit of a key is alpha * score + its shift; that of a key that does not exist is -inf.
  template <int BN>
  LR_DEVICE void add_shifted(float (&s)[BN / 2], float alpha, uint32_t shifts) {
    const uint32_t mine = shifts + thread_index() % 4 * 8;
#pragma unroll
    for (int i = 0; i < BN / 8; ++i) {
      float low, high;
      load_shared(mine + 32 * i, low, high);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        s[4 * i + 2 * r] = fmaf(s[4 * i + 2 * r], alpha, low);
        s[4 * i + 2 * r + 1] = fmaf(s[4 * i + 2 * r + 1], alpha, high);
      }
    }
    weigh<BN>(s, 1);
  }

  // Joins the sums of the four threads of a row.
  LR_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += shuffle_xor(sum[r], 1);
      sum[r] += shuffle_xor(sum[r], 2);
    }
  }

 private:
  // Logits, as multiples of scale, become weights.
  template <int BN>
  LR_DEVICE void weigh(float (&s)[BN / 2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      raise<BN>(s, r, scale);
      float here[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < BN / 4; ++i) {
        float& x = s[i / 2 * 4 + 2 * r + i % 2];
        x = exp2_fast(fmaf(x, scale, -top[r]));
        here[i % 2] += x;
      }
      sum[r] = sum[r] * shrink[r] + (here[0] + here[1]);
    }
  }
  template <int BN>
  LR_DEVICE void raise(const float (&s)[BN / 2], int r, float scale) {
    float high = s[2 * r];
#pragma unroll
    for (int i = 1; i < BN / 4; ++i) high = fmaxf(high, s[i / 2 * 4 + 2 * r + i % 2]);
    high = fmaxf(high, shuffle_xor(high, 1));
    high = fmaxf(high, shuffle_xor(high, 2));
    // min(): a visible +inf gives NaN for its own row. max() drops a NaN, which the weights carry on.
    const float now = fminf(fmaxf(top[r], high * scale), kMax);
    shrink[r] = exp2_fast(top[r] - now);
    top[r] = now;
  }
};

template <class C>
struct Consumer {
  static constexpr int D = C::D, BN = C::BN;
  static constexpr bool kFull = D > 128;  // the loop over the tiles needs all registers
  using Scores = Wgmma<BN, C::Half, false>;
  using Weighted = Wgmma<D, C::Half, true>;

  const Problem& x;
  const Shared<C>& shared;
  const AttentionParams& p = x.attention;
  const int lane = thread_index() % 32, warp = thread_index() / 32 % 4;
  const int number = warp_sum(lane == 0 ? thread_index() / 128 : 0);  // uniform, and known to be
  const int chunks = static_cast<int>(p.d / 8);
  const float scale = p.scale * kLog2e;
  Ring<C::Stages> key, value;
  float o[D / 2], s[BN / 2];
  uint32_t q[C::SharedQueries ? 1 : C::Steps][4], weight[BN / 16][4];

  LR_DEVICE Consumer(const Problem& problem, const Shared<C>& places) : x(problem), shared(places) {}

  LR_DEVICE void run() {
    if (number == C::Consumers - 1) barrier_arrive(1, 256);  // the first turn is that of consumer 0
    for (int n = block_index(); n < x.works; n += grid_size()) {
      const Work<C> w(x, n, lane);
      load_queries(w, Rows(*this, w));
      Cursor cursor;
      bool again[2] = {false, false};  // rows whose numbers left fp32
      const int groups = C::General ? p.softmax_groups : 1;
      for (int g = 0; g < groups; ++g) {
        const bool mine = !C::General || (lane < p.sources && p.source[lane].softmax_group == g);
        const int tiles = warp_sum(mine ? w.tiles() : 0);
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = 0;
        if (tiles > 0) walk(w, cursor, softmax, tiles);
        softmax.finish();
        const Work<C> same(x, kFull ? forget(n) : n, lane);
        const Rows rows(*this, same);
        end_group(same, rows, g, softmax, tiles > 0, again);
        if (C::General && groups > 1) add_to_result(g, groups);
        if (g + 1 == groups) store(same, rows, softmax, again);
      }
    }
    if (number == 0) barrier_sync(1, 256);  // takes the turn that nobody needs any more
  }

 private:
  // Of a warp's 16 queries, the tokens of this thread's two.
  struct Rows {
    int slot, query[2];  // slot: the place of the first of the 16 in the order of the queries
    bool exists[2];
    LR_DEVICE Rows(const Consumer& me, const Work<C>& w) : slot(w.first + me.number * 64 + me.warp * 16) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = slot + me.lane / 4 + 8 * r;
        exists[r] = at < w.end;
        query[r] = !exists[r]         ? 0
                   : me.p.query_order ? load_global(me.p.query_order + w.b * me.p.order_stride + at)
                                      : at;
      }
    }
  };

  LR_DEVICE void load_queries(const Work<C>& w, const Rows& rows) {
    const auto* from = static_cast<const uint16_t*>(p.query) + w.b * p.query_stride[0] + w.h * p.query_stride[2];
    if constexpr (C::SharedQueries) {
      copy_queries(from, rows, w.end - rows.slot);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto* of_row = from + rows.query[r] * p.query_stride[1] + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < 2 * C::Steps; ++k)
          q[k / 2][k % 2 * 2 + r] =
              rows.exists[r] && k < chunks ? load_global(reinterpret_cast<const uint32_t*>(of_row + 8 * k)) : 0;
      }
    }
  }
  // The 16 queries of this warp, `left` of which exist, with the same channels for a lane in each. All warps are done
  // with their products before any of them fills its place again, and all have filled it before any goes on.
  LR_DEVICE void copy_queries(const uint16_t* from, const Rows& rows, int left) const {
    barrier_sync(3 + number, 128);
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const int64_t token = shuffle(i < 8 ? rows.query[0] : rows.query[1], i % 8 * 4);
#pragma unroll
      for (int unit = lane; unit < C::Chunks; unit += 32)
        copy_async<16>(shared.query(number) + C::Queries::place(warp * 16 + i, unit),
                       from + token * p.query_stride[1] + 8 * unit, i < left && unit < chunks);
    }
    copy_async_wait_all();
    barrier_sync(3 + number, 128);  // walk() makes the fence
  }

  // ---- The products

  LR_DEVICE void my_turn() const { barrier_sync(1 + number, 256); }
  LR_DEVICE void your_turn() const { barrier_arrive(1 + (number + 1) % C::Consumers, 256); }
  LR_DEVICE void arrive(uint32_t barrier) const {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  LR_DEVICE void start_scores() {
    const uint64_t keys = C::Keys::by_channels(shared.key(key.stage));
    if (C::SharedQueries) {
      const uint64_t queries = C::Queries::by_channels(shared.query(number));
#pragma unroll
      for (int k = 0; k < C::Steps; ++k)
        Scores::add(s, queries + C::Queries::channel_step(k), keys + C::Keys::channel_step(k), k > 0);
    } else {
#pragma unroll
      for (int k = 0; k < C::Steps; ++k) Scores::add(s, q[k], keys + C::Keys::channel_step(k), k > 0);
    }
    wgmma_commit();
  }
  LR_DEVICE void start_weighted() {
    const uint64_t values = C::Keys::by_rows(shared.value(value.stage));
#pragma unroll
    for (int k = 0; k < BN / 16; ++k) Weighted::add(o, weight[k], values + C::Keys::row_step(k), true);
    wgmma_commit();
  }

  // The scores have arrived: they become weights, and their place in the ring is free.
  LR_DEVICE void take_scores(const Work<C>& w, Cursor& cursor, Softmax& softmax) {
    pin(s);
    const int valid = cursor.next<BN>(w.stop - w.begin);
    if (C::General) {
      softmax.template add_shifted<BN>(s, shuffle(w.alpha, cursor.source), shared.shift(key.stage, 0));
      arrive(shared.empty_key(key.stage));
    } else {
      arrive(shared.empty_key(key.stage));
      softmax.template add<BN>(s, valid, scale);
    }
    key.next();
  }
  LR_DEVICE void end_values() {
    wgmma_wait<0>();
    pin(o);
    arrive(shared.empty_value(value.stage));
    value.next();
  }
  LR_DEVICE void pack_weights() {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) weight[i / 4][i % 4] = pack<C::Half>(s[2 * i], s[2 * i + 1]);
  }

  // Makes what cp.async wrote visible to the products; what TMA wrote is.
  LR_DEVICE void see_copies() const {
    if (C::SharedQueries || x.gathers) fence_async();
  }
  // The scores of tile t and the values of tile t - 1 are in flight together; the softmax of t runs beside the latter.
  LR_DEVICE void walk(const Work<C>& w, Cursor& cursor, Softmax& softmax, int tiles) {
    mbarrier_wait(shared.full_key(key.stage), key.round, "full_key");
    see_copies();
    my_turn();
    wgmma_fence();
    start_scores();
    your_turn();
    wgmma_wait<0>();
    take_scores(w, cursor, softmax);
    pack_weights();
    if (tiles > 1) mbarrier_wait(shared.full_key(key.stage), key.round, "full_key");
    for (int t = 1; t < tiles; ++t) {
      mbarrier_wait(shared.full_value(value.stage), value.round, "full_value");
      see_copies();
      my_turn();
      pin(o);
      wgmma_fence();
      start_scores();
      start_weighted();
      your_turn();
      wgmma_wait<1>();
      take_scores(w, cursor, softmax);
      // Here and not before the scores: ptxas moves the wait for the values over the softmax, but not over a branch
      if (t + 1 < tiles) mbarrier_wait(shared.full_key(key.stage), key.round, "full_key");
      end_values();
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= softmax.shrink[i / 2 % 2];
      pack_weights();
    }
    mbarrier_wait(shared.full_value(value.stage), value.round, "full_value");
    see_copies();
    pin(o);
    wgmma_fence();
    start_weighted();
    end_values();
  }

  // ---- The results

  // Divides the sums of a softmax group. No visible key: out 0, lse -inf.
  LR_DEVICE void end_group(const Work<C>& w, const Rows& rows, int g, const Softmax& softmax, bool sees,
                           bool (&again)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax.sum[r];
      float factor = sum == 0 ? 0 : 1 / sum, finite = 0;
      if (C::General && p.weight[g] && rows.exists[r])
        factor *= load_global(p.weight[g] + w.b * p.weight_stride[g][0] + rows.query[r] * p.weight_stride[g][1]);
#pragma unroll
      for (int i = 0; i < D / 4; ++i) {
        float& y = o[i / 2 * 4 + 2 * r + i % 2];
        y *= factor;
        finite = fmaf(y, 0, finite);  // becomes NaN at the first y that is not finite
      }
      const bool near = fabsf(softmax.top[r]) < kFar && sum > 0;
      again[r] |= rows.exists[r] && ((sees && !near) || finite != 0);
    }
  }

  // The sum over the groups so far waits in global memory, where a block keeps its own numbers: the registers are full.
  LR_DEVICE void add_to_result(int g, int groups) {
    constexpr int kThreads = 128 * C::Consumers;
    float* at = x.results + int64_t(block_index()) * (D / 2) * kThreads + thread_index();
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      if (g > 0) o[i] += load_own(at + i * kThreads);
      if (g + 1 < groups) store_global(at + i * kThreads, o[i]);
    }
  }

  LR_DEVICE void store(const Work<C>& w, const Rows& rows, const Softmax& softmax, const bool (&again)[2]) {
    uint32_t slow[2];  // bits of the lanes whose row is done again; four lanes share a row
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      slow[r] = ballot(again[r]);
      if (!rows.exists[r] || slow[r] >> lane / 4 * 4 & 15) continue;
      const double top = double(softmax.top[r]) * kLn2, sum = double(softmax.sum[r]);
      if (x.parts > 1)
        store_part(w, rows.query[r], r, top, sum);
      else
        store_row(w, rows.query[r], r, top, sum);
    }
    if (slow[0] | slow[1])
#pragma unroll 1
      for (int i = 0; i < 16; ++i)
        if ((i < 8 ? slow[0] : slow[1]) >> i % 8 * 4 & 15) attend_precisely(x, w, rows.slot + i, lane);
  }
  LR_DEVICE void store_row(const Work<C>& w, int64_t query, int r, double top, double sum) const {
    auto* to = static_cast<uint16_t*>(p.out) + w.b * p.out_stride[0] + query * p.out_stride[1] + w.h * p.out_stride[2] +
               lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::Chunks; ++i)
      if (i < chunks)
        store_global(reinterpret_cast<uint32_t*>(to + 8 * i), pack<C::Half>(o[4 * i + 2 * r], o[4 * i + 2 * r + 1]));
    if (lane % 4 == 0) store_lse(p, w.b, query, w.h, top, sum);
  }
  LR_DEVICE void store_part(const Work<C>& w, int64_t query, int r, double top, double sum) const {
    const int64_t cell = w.cell(p, query);
    float* to = x.part_out + cell * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) store_global(to + 8 * i, o[4 * i + 2 * r], o[4 * i + 2 * r + 1]);
    if (lane % 4 == 0) store_part_sums(x, cell, top, sum);
  }
};

}  // namespace lr::sm90
