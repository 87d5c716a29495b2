// Rows of memory <-> columns: [d, lanes] floats with one row per SIMD lane.
#pragma once
#include <algorithm>

#include "cpu/simd_convert.h"

namespace lr::LR_ISA {
namespace {

// Indices into the pair (first row, second row) that exchange the off-diagonal squares of side kStep. As data: built in
// registers they cost more than the exchange.
template <int kStep>
struct Exchange {
  alignas(sizeof(VecInt)) int32_t low[kLanes] = {};
  alignas(sizeof(VecInt)) int32_t high[kLanes] = {};
  constexpr Exchange() {
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & kStep ? kLanes + i - kStep : i;
      high[i] = i & kStep ? kLanes + i : i + kStep;
    }
  }
};

// Swaps rows and columns of a square of kLanes rows in registers.
template <int kStep = 1>
LR_INLINE void transpose_square(Vec (&row)[kLanes]) {
  if constexpr (kStep < kLanes) {
    static constexpr Exchange<kStep> kExchange;
    const VecInt low = *reinterpret_cast<const VecInt*>(kExchange.low);
    const VecInt high = *reinterpret_cast<const VecInt*>(kExchange.high);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const Vec a = row[i], b = row[i + kStep];
      row[i] = __builtin_shuffle(a, b, low);
      row[i + kStep] = __builtin_shuffle(a, b, high);
    }
    transpose_square<2 * kStep>(row);
  }
}

// Calls visit(first) for groups of kLanes channels that cover [0, d), the last one overlapping where d is no multiple.
template <class F>
LR_INLINE void channel_groups(int64_t d, F visit) {
  for (int64_t first = 0; first < d; first += kLanes) visit(std::min(first, d - kLanes));
}

// out[c · lanes + i] = row(i)[c] for c < d, i < lanes. lanes: a multiple of kLanes.
template <class Row>
LR_INLINE void rows_to_columns(Row row, int64_t lanes, int64_t d, float* out) {
  if (d < kLanes) {
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t c = 0; c < d; ++c) out[c * lanes + i] = to_float(row(i)[c]);
    return;
  }
  for (int64_t lane = 0; lane < lanes; lane += kLanes)
    channel_groups(d, [&](int64_t first) {
      Vec x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) x[i] = load_as_float(row(lane + i) + first);
      transpose_square(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (first + i) * lanes + lane, x[i]);
    });
}

// row(i)[c] = in[c · lanes + i] for c < d, i < count.
template <class Row>
LR_INLINE void columns_to_rows(const float* in, int64_t lanes, int64_t count, int64_t d, Row row) {
  if (d < kLanes) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < d; ++c) from_float(in[c * lanes + i], row(i)[c]);
    return;
  }
  for (int64_t lane = 0; lane < count; lane += kLanes)
    channel_groups(d, [&](int64_t first) {
      Vec x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) x[i] = load(in + (first + i) * lanes + lane);
      transpose_square(x);
      const int64_t rows = std::min<int64_t>(kLanes, count - lane);
      for (int64_t i = 0; i < rows; ++i) store_from_float(row(lane + i) + first, x[i]);
    });
}

}  // namespace
}  // namespace lr::LR_ISA
