// merge_attention_states for one instruction set (LR_ISA).
#include <algorithm>
#include <cmath>

#include "cpu/launch.h"
#include "cpu/simd_convert.h"

namespace lr::LR_ISA {
namespace {

constexpr int64_t kSerialElements = 1 << 16;  // below this, waking a thread costs more than it saves
constexpr int64_t kTokens = 64;               // of one work item

// The parts' shares of the softmax; returns its log-sum-exp.
float shares(const float* lse, int count, float* share) {
  float top = -INFINITY;
  bool nan = false;
  for (int k = 0; k < count; ++k) {
    top = std::max(top, lse[k]);
    nan |= std::isnan(lse[k]);
  }
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = 0;
  for (int k = 0; k < count; ++k) sum += share[k] = std::exp(lse[k] - base);
  for (int k = 0; k < count && sum != 0; ++k) share[k] /= sum;
  return top == INFINITY && !nan ? INFINITY : base + std::log(sum);
}

// A part without a share adds nothing but its NaNs, which mark a NaN in a value that the query sees.
LR_INLINE Vec term(Vec x, float share) {
  if (share != 0.0f) return x * share;
  return x == x ? Vec{} : x;
}

template <class T>
void merge_row(const T* const* part, const float* share, int count, int64_t d, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Vec sum{};
    for (int k = 0; k < count; ++k) sum += term(load_as_float(part[k] + i), share[k]);
    store_from_float(out + i, sum);
  }
  if (i == d) return;
  Vec sum{};
  for (int k = 0; k < count; ++k) {
    T padded[kLanes] = {};
    std::memcpy(padded, part[k] + i, (d - i) * sizeof(T));
    sum += term(load_as_float(padded), share[k]);
  }
  T padded[kLanes];
  store_from_float(padded, sum);
  std::memcpy(out + i, padded, (d - i) * sizeof(T));
}

template <class T>
void merge_tokens(void* context, int64_t item) {
  const auto& p = *static_cast<const MergeParams*>(context);
  for (int64_t token = item * kTokens; token < std::min((item + 1) * kTokens, p.b * p.n); ++token) {
    const int64_t b = token / p.n, i = token % p.n;
    const auto at = [&](int64_t h, const int64_t (&stride)[3]) {
      return b * stride[0] + i * stride[1] + h * stride[2];
    };
    for (int64_t h = 0; h < p.h; ++h) {
      const T* part[kMaxParts];
      float lse[kMaxParts], share[kMaxParts];
      for (int k = 0; k < p.parts; ++k) {
        part[k] = static_cast<const T*>(p.part[k]) + at(h, p.part_stride[k]);
        lse[k] = p.part_lse[k][at(h, p.part_lse_stride[k])];
      }
      const int64_t row = token * p.h + h;
      p.lse[row] = shares(lse, p.parts, share);
      merge_row(part, share, p.parts, p.d, static_cast<T*>(p.out) + row * p.d);
    }
  }
}

}  // namespace

void merge_kernel(const MergeParams& p, const Parallel& parallel) {
  const int64_t items = (p.b * p.n + kTokens - 1) / kTokens;
  const bool alone = p.parts * p.b * p.n * p.h * p.d < kSerialElements;
  run_items(parallel, items, alone, with_element(p.dtype, [](auto x) { return merge_tokens<decltype(x)>; }),
            const_cast<MergeParams*>(&p));
}

}  // namespace lr::LR_ISA
