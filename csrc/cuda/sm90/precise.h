// Attention in double, one query after the other: for queries whose logits or sums leave fp32. It is slow, and right
// for numbers of any size.
#pragma once
#include "cuda/sm90/eight_bit.h"
#include "cuda/sm90/work.h"

namespace lr::sm90 {

LR_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

// A softmax group of one query: the running softmax, and of its sums the channels lane + 32 k.
template <class C>
struct PreciseGroup {
  static constexpr int kParts = (C::D + 31) / 32;
  double top = -INFINITY, sum = 0, out[kParts] = {};

  LR_DEVICE void add(double logit, const StoredRow& value, int lane, int d) {
    const double now = fmax(top, logit);
    const float shrink = top == -INFINITY ? 0 : exp2_fast(float((top - now) * double(kLog2e)));
    const float weight = logit == -INFINITY ? 0 : exp2_fast(float((logit - now) * double(kLog2e)));
    top = now;
    sum = sum * shrink + weight;
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      if (lane + 32 * k < d) out[k] = out[k] * shrink + weight * value.template number<C::Half>(32 * k);
  }
};

template <class C>
LR_DEVICE void store_precisely(const Problem& x, const Work<C>& w, int64_t i, int lane,
                               const double (&result)[PreciseGroup<C>::kParts], double top, double sum) {
  const AttentionParams& p = x.attention;
  const int d = static_cast<int>(p.d);
  const int64_t cell = w.cell(p, i);
  auto* out = static_cast<uint16_t*>(p.out) + w.b * p.out_stride[0] + i * p.out_stride[1] + w.h * p.out_stride[2];
#pragma unroll
  for (int k = 0; k < PreciseGroup<C>::kParts; ++k) {
    const int channel = lane + 32 * k;
    if (channel >= d) continue;
    if (x.parts > 1)
      store_global(x.part_out + cell * C::D + channel, float(result[k]));
    else
      store_global(out + channel, uint16_t(pack<C::Half>(float(result[k]), 0)));
  }
  if (lane != 0) return;
  if (x.parts > 1)
    store_part_sums(x, cell, top, sum);
  else
    store_lse(p, w.b, i, w.h, top, sum);
}

// From channel `lane` on.
template <class C>
LR_DEVICE StoredRow stored_row(const AttentionSource& source, const void* data, const int64_t (&stride)[3],
                               const float* scales, const int64_t (&scale_stride)[3], int row, int64_t token, int h,
                               int lane) {
  const int64_t at = row * stride[0] + token * stride[1] + h * stride[2] + lane;
  if (!C::General || source.storage == Storage::kElements)
    return {static_cast<const uint16_t*>(data) + at, Storage::kElements, 1};
  return {static_cast<const uint8_t*>(data) + at, source.storage, scale_of(scales, scale_stride, row, token, h)};
}

// The query at place `slot` of the order of the queries, by one warp.
template <class C>
LR_DEVICE void attend_precisely(const Problem& x, const Work<C>& w, int slot, int lane) {
  constexpr int kParts = PreciseGroup<C>::kParts;
  const AttentionParams& p = x.attention;
  const int d = static_cast<int>(p.d);
  const int64_t i = p.query_order ? load_global(p.query_order + w.b * p.order_stride + slot) : slot;
  const auto* query = static_cast<const uint16_t*>(p.query) + w.b * p.query_stride[0] + i * p.query_stride[1] +
                      w.h * p.query_stride[2] + lane;
  double q[kParts], result[kParts] = {}, top = -INFINITY, sum = 0;  // top, sum: of the last group
#pragma unroll
  for (int k = 0; k < kParts; ++k) q[k] = lane + 32 * k < d ? double(unpack<C::Half>(load_global(query + 32 * k))) : 0;

  PreciseGroup<C> group;
#pragma unroll 1
  for (int s = 0; s < p.sources; ++s) {
    const AttentionSource& source = p.source[s];
    const int begin = shuffle(w.begin, s), stop = shuffle(w.stop, s), row = shuffle(w.row, s);
    const int head = w.h / source.heads_per_key_head;
    double alpha = p.scale, beta = 0;
    if (source.logit_scale)
      alpha *=
          load_global(source.logit_scale + w.b * source.logit_scale_stride[0] + w.h * source.logit_scale_stride[1]);
    if (source.logit_bias)
      beta = load_global(source.logit_bias + w.b * source.logit_bias_stride[0] + w.h * source.logit_bias_stride[1]);
#pragma unroll 1
    for (int at = begin; at < stop; ++at) {
      int64_t token = at, from;
      if (source.key_index)
        token = load_global(source.key_index + w.c * source.index_stride[0] + row * source.index_stride[1] + at);
      from = token;
      if (source.value_index) {
        from = load_global(source.value_index + row * source.value_index_stride[0] +
                           w.b * source.value_index_stride[1] + token);
        from = from < 0 ? 0 : from < source.v ? from : source.v - 1;
      }
      const StoredRow key = stored_row<C>(source, source.key, source.key_stride, source.key_scale,
                                          source.key_scale_stride, row, token, head, lane);
      const StoredRow value = stored_row<C>(source, source.value, source.value_stride, source.value_scale,
                                            source.value_scale_stride, row, from, head, lane);
      double dot = 0;
#pragma unroll
      for (int k = 0; k < kParts; ++k)
        if (lane + 32 * k < d) dot += q[k] * key.template number<C::Half>(32 * k);
      double logit = alpha * warp_sum(dot) + beta;
      if (source.key_bias) logit += double(load_global(source.key_bias + row * source.bias_stride + token));
      group.add(logit, value, lane, d);
    }
    if (s + 1 < p.sources && p.source[s + 1].softmax_group == source.softmax_group) continue;
    const int g = source.softmax_group;
    double factor = group.sum == 0 ? 0 : 1 / group.sum;
    if (p.weight[g])
      factor *= double(load_global(p.weight[g] + w.b * p.weight_stride[g][0] + i * p.weight_stride[g][1]));
#pragma unroll
    for (int k = 0; k < kParts; ++k) result[k] += group.out[k] * factor;
    top = group.top, sum = group.sum;
    group = {};
  }
  store_precisely<C>(x, w, i, lane, result, top, sum);
}

}  // namespace lr::sm90
