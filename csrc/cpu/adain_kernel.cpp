// adain for one instruction set (LR_ISA). A work item is a strip of columns of one batch row; a column is a channel of
// a head. Statistics are sums of differences to the first chosen token, in double: one pass, and a mean far from 0 does
// not cancel. Where the tokens of a single channel are contiguous, as in latents, blocks of tokens lie in the columns.
#include <algorithm>
#include <cmath>

#include "cpu/launch.h"
#include "cpu/simd_convert.h"

namespace lr::LR_ISA {
namespace {

constexpr int kStrip = 32;                    // columns of a work item
constexpr int64_t kSerialElements = 1 << 16;  // below this, waking a thread costs more than it saves

// n elements and zeros up to kStrip.
template <class T>
LR_INLINE void load_strip(const T* p, int64_t n, float* out) {
  to_floats(p, n, out);
  for (int64_t i = n; i < kStrip; ++i) out[i] = 0;
}

template <class T>
LR_INLINE void store_strip(T* p, int64_t n, const float* x) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_from_float(p + i, load_as_float(x + i));
  for (; i < n; ++i) from_float(x[i], p[i]);
}

struct Statistics {
  int64_t count;  // of chosen tokens
  double mean[kStrip], deviation[kStrip];
};

struct Sums {
  double shift[kStrip], sum[kStrip] = {}, square[kStrip] = {};

  LR_INLINE void add(const float* x) {
    for (int c = 0; c < kStrip; ++c) {
      const double difference = x[c] - shift[c];
      sum[c] += difference;
      square[c] += difference * difference;
    }
  }

  void finish(double eps, Statistics& out) const {
    const double n = static_cast<double>(out.count);
    for (int c = 0; c < kStrip; ++c) {
      const double mean = sum[c] / n, variance = square[c] / n - mean * mean;
      out.mean[c] = shift[c] + mean;
      out.deviation[c] = std::sqrt((variance < 0 ? 0 : variance) + eps);
    }
  }
};

int64_t first_chosen(const uint8_t* mask, int64_t tokens) {
  int64_t i = 0;
  while (i < tokens && mask && !mask[i]) ++i;
  return i;
}

template <class T>
void statistics_of_columns(const T* x, int64_t stride, int64_t columns, const uint8_t* mask, int64_t tokens, double eps,
                           Statistics& out) {
  out.count = 0;
  const int64_t first = first_chosen(mask, tokens);
  if (first == tokens) return;
  Sums sums;
  float row[kStrip];
  load_strip(x + first * stride, columns, row);
  for (int c = 0; c < kStrip; ++c) sums.shift[c] = row[c];
  for (int64_t i = first; i < tokens; ++i) {
    if (mask && !mask[i]) continue;
    load_strip(x + i * stride, columns, row);
    sums.add(row);
    ++out.count;
  }
  sums.finish(eps, out);
}

// The first n places of a mask as 0 or 1, and zeros up to kStrip; a null mask chooses all n.
LR_INLINE void load_chosen(const uint8_t* mask, int64_t n, float* chosen) {
  uint8_t flag[kStrip] = {};
  if (mask)
    std::memcpy(flag, mask, n);
  else
    std::memset(flag, 1, n);
  for (int c = 0; c < kStrip; ++c) chosen[c] = flag[c];
}

// Of one channel whose tokens are contiguous. A token that is not chosen counts as the shift, which adds nothing.
template <class T>
void statistics_of_tokens(const T* x, const uint8_t* mask, int64_t tokens, double eps, Statistics& out) {
  out.count = 0;
  const int64_t first = first_chosen(mask, tokens);
  if (first == tokens) return;
  const float shift = to_float(x[first]);
  Sums sums;
  std::fill(sums.shift, sums.shift + kStrip, shift);
  float row[kStrip], chosen[kStrip];
  for (int64_t i = 0; i < tokens; i += kStrip) {
    const int64_t n = std::min<int64_t>(kStrip, tokens - i);
    load_strip(x + i, n, row);
    if (mask || n < kStrip) {
      load_chosen(mask ? mask + i : nullptr, n, chosen);
      int32_t count = 0;
      for (int c = 0; c < kStrip; ++c) {
        row[c] = chosen[c] != 0.0f ? row[c] : shift;
        count += static_cast<int32_t>(chosen[c]);
      }
      out.count += count;
    } else {
      out.count += n;
    }
    sums.add(row);
  }
  for (int c = 1; c < kStrip; ++c) {
    sums.sum[0] += sums.sum[c];
    sums.square[0] += sums.square[c];
  }
  sums.finish(eps, out);
}

// Maps x to (x - high) * gain + offset. `high` is the mean as a float; what rounding took from it is part of `offset`,
// so that a mean far from 0 loses nothing.
struct Map {
  float high[kStrip], gain[kStrip], offset[kStrip];

  Map(const Statistics& x, const Statistics& reference) {
    for (int c = 0; c < kStrip; ++c) {
      const double scale = reference.deviation[c] / x.deviation[c];
      high[c] = static_cast<float>(x.mean[c]);
      gain[c] = static_cast<float>(scale);
      offset[c] = static_cast<float>(reference.mean[c] - (x.mean[c] - high[c]) * scale);
    }
  }

  LR_INLINE void apply(float* x) const {
    for (int c = 0; c < kStrip; ++c) x[c] = (x[c] - high[c]) * gain[c] + offset[c];
  }

  void spread_first() {
    std::fill(high, high + kStrip, high[0]);
    std::fill(gain, gain + kStrip, gain[0]);
    std::fill(offset, offset + kStrip, offset[0]);
  }
};

struct Work {
  AdainParams p;
  int64_t strips;  // of a head
  bool along_tokens;
};

template <class T>
void strip(void* context, int64_t item) {
  const auto& [p, strips, along_tokens] = *static_cast<const Work*>(context);
  const int64_t first = item % strips * kStrip, h = item / strips % p.h, b = item / strips / p.h;
  const int64_t columns = std::min<int64_t>(kStrip, p.d - first);
  const auto column = [&](const AdainTokens& t) {
    return static_cast<const T*>(t.data) + b * t.stride[0] + h * t.stride[2] + first;
  };
  const auto mask_of = [&](const AdainTokens& t) { return t.mask ? t.mask + b * t.mask_stride : nullptr; };
  const auto statistics = [&](const AdainTokens& t, Statistics& out) {
    if (along_tokens && t.stride[1] == 1)
      statistics_of_tokens(column(t), mask_of(t), t.tokens, p.eps, out);
    else
      statistics_of_columns(column(t), t.stride[1], columns, mask_of(t), t.tokens, p.eps, out);
  };
  Statistics own, other;
  statistics(p.x, own);
  statistics(p.reference, other);
  const bool unchanged = own.count == 0 || other.count == 0;

  const T* x = column(p.x);
  T* out = static_cast<T*>(p.out) + b * p.out_stride[0] + h * p.out_stride[2] + first;
  const uint8_t* mask = mask_of(p.x);
  float row[kStrip];
  if (unchanged) {
    for (int64_t i = 0; i < p.x.tokens; ++i)
      std::memcpy(out + i * p.out_stride[1], x + i * p.x.stride[1], columns * sizeof(T));
    return;
  }
  Map map(own, other);
  if (along_tokens && p.x.stride[1] == 1 && p.out_stride[1] == 1) {
    map.spread_first();
    float chosen[kStrip], before[kStrip];
    for (int64_t i = 0; i < p.x.tokens; i += kStrip) {
      const int64_t n = std::min<int64_t>(kStrip, p.x.tokens - i);
      load_strip(x + i, n, row);
      std::memcpy(before, row, sizeof(row));
      map.apply(row);
      if (mask) {
        load_chosen(mask + i, n, chosen);
        for (int c = 0; c < kStrip; ++c) row[c] = chosen[c] != 0.0f ? row[c] : before[c];
      }
      store_strip(out + i, n, row);
    }
    return;
  }
  for (int64_t i = 0; i < p.x.tokens; ++i) {
    if (mask && !mask[i]) {
      std::memcpy(out + i * p.out_stride[1], x + i * p.x.stride[1], columns * sizeof(T));
      continue;
    }
    load_strip(x + i * p.x.stride[1], columns, row);
    map.apply(row);
    store_strip(out + i * p.out_stride[1], columns, row);
  }
}

}  // namespace

void adain_kernel(const AdainParams& params, const Parallel& parallel) {
  Work work{params, 0, false};
  AdainParams& p = work.p;
  if (p.x.stride[2] == p.d && p.reference.stride[2] == p.d && p.out_stride[2] == p.d) {  // heads follow each other
    p.d *= p.h;
    p.h = 1;
  }
  work.strips = (p.d + kStrip - 1) / kStrip;
  work.along_tokens = p.d == 1;
  const int64_t items = p.b * p.h * work.strips;
  const bool alone = p.b * p.h * p.d * (p.x.tokens + p.reference.tokens) < kSerialElements;
  run_items(parallel, items, alone, with_element(p.dtype, [](auto x) { return strip<decltype(x)>; }), &work);
}

}  // namespace lr::LR_ISA
