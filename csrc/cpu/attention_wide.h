// One query of multi_source_attention in double: for logits, and sums of weighted values, that fp32 cannot hold.
// Included by attention_kernel.cpp, which takes few queries here: those whose fp32 result shows that it could not.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/attention_sources.h"

namespace lr::LR_ISA {
namespace {

// The softmax over the keys of one group so far.
struct WideSoftmax {
  double top = -INFINITY, sum = 0, out[kMaxHeadDim] = {};

  template <class S>
  void add(double logit, const S* value, int d) {
    if (logit > top) {
      const double shrink = std::exp(top - logit);  // 0 for the first key
      top = logit;
      sum *= shrink;
      for (int c = 0; c < d; ++c) out[c] *= shrink;
    }
    // a logit of -inf has no weight, but a NaN in its value is seen; +inf and NaN make everything NaN
    const double weight = logit == -INFINITY ? 0.0 : std::exp(logit - top);
    sum += weight;
    for (int c = 0; c < d; ++c) out[c] += weight * double(to_float(value[c]));
  }
};

template <class S>
class WideQuery {
 public:
  // query: [d], at a position of the tile
  WideQuery(const AttentionParams& params, const QueryTile& its_tile, int64_t position, const S* query)
      : p(params), tile(its_tile), number(TileOrder(params, its_tile)(position)), d(int(params.d)), e(int(params.e)) {
    for (int c = 0; c < d; ++c) q[c] = double(to_float(query[c]));
  }

  // result: [e], the groups' weighted sum; weight_at(g): the weight of group g, 1 where it has none. Returns the lse of
  // the last group.
  template <class Weight>
  double attend(Weight weight_at, double* result) {
    std::fill_n(result, e, 0.0);
    double lse = -INFINITY;
    for (int first = 0; first < p.sources;) {
      const int group = p.source[first].softmax_group;
      WideSoftmax softmax;
      for (; first < p.sources && p.source[first].softmax_group == group; ++first) {
        if (add_keys(p.source[first], softmax)) continue;
        std::fill_n(result, e, double(NAN));
        return NAN;
      }
      const double factor = softmax.sum == 0 ? 0.0 : weight_at(group) / softmax.sum;
      for (int c = 0; c < e; ++c) result[c] += softmax.out[c] * factor;
      // sum is NaN beside a top of +inf
      lse = softmax.top == INFINITY ? double(INFINITY) : softmax.top + std::log(softmax.sum);
    }
    return lse;
  }

 private:
  const AttentionParams& p;
  const QueryTile& tile;
  const int64_t number;  // of the query
  const int d, e;
  double q[kMaxHeadDim];

  // False where a logit is NaN: so is the result, then.
  bool add_keys(const AttentionSource& source, WideSoftmax& softmax) const {
    const VisibleKeys<S> keys(source, tile);
    const double scale = p.scale * double(keys.logit_scale);
    Places seen{0, keys.count};
    if (source.key_range && keys.row >= 0)
      seen = keys.places_of(source.key_range + tile.b * source.range_stride + 2 * number);
    S room[kMaxHeadDim];
    for (int64_t i = seen.first; i < seen.last; ++i) {
      const int64_t token = keys.token(i);
      const S* key = elements_of(keys.stored_key(token), d, room);
      const double logit = scale * score(key) + double(keys.logit_bias) + double(keys.bias_of(token));
      if (std::isnan(logit)) return false;
      softmax.add(logit, elements_of(keys.stored_value(token), e, room), e);
    }
    return true;
  }

  double score(const S* key) const {
    constexpr int kParts = 8;  // one chain of additions would be eight times slower
    double part[kParts] = {};
    int c = 0;
    for (; c + kParts <= d; c += kParts)
      for (int i = 0; i < kParts; ++i) part[i] += q[c + i] * double(to_float(key[c + i]));
    for (; c < d; ++c) part[0] += q[c] * double(to_float(key[c]));
    for (int i = 1; i < kParts; ++i) part[0] += part[i];
    return part[0];
  }
};

// A double as a float that is finite where the double is: beyond the range, its end.
inline float finite_float(double x) {
  return float(std::isfinite(x) ? std::clamp(x, -double(FLT_MAX), double(FLT_MAX)) : x);
}

}  // namespace
}  // namespace lr::LR_ISA
