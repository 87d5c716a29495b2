// A number for each query of a slice: two SIMD vectors, one query per lane. The vector itself is the library's own.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "cpu/simd.h"
#include "problem.h"

using namespace lr::LR_ISA;

constexpr int kSlice = 2 * kLanes;           // queries in a slice
constexpr int kTile = kLanes == 8 ? 6 : 8;   // keys, or channels, whose sums are kept in registers: 12 of AVX2's 16

struct Lanes {
  Vec low, high;
};

LR_INLINE Lanes all(float x) { return {set1(x), set1(x)}; }
LR_INLINE Lanes operator+(const Lanes& a, const Lanes& b) { return {a.low + b.low, a.high + b.high}; }
LR_INLINE Lanes operator-(const Lanes& a, const Lanes& b) { return {a.low - b.low, a.high - b.high}; }
LR_INLINE Lanes operator*(const Lanes& a, const Lanes& b) { return {a.low * b.low, a.high * b.high}; }
LR_INLINE Lanes operator*(float a, const Lanes& b) { return {set1(a) * b.low, set1(a) * b.high}; }
LR_INLINE Lanes max(const Lanes& a, const Lanes& b) { return {max(a.low, b.low), max(a.high, b.high)}; }
LR_INLINE Lanes exp2(const Lanes& x) { return {exp2<6>(x.low), exp2<6>(x.high)}; }
LR_INLINE bool any_greater(const Lanes& a, const Lanes& b) {
  return any_greater(a.low, b.low) || any_greater(a.high, b.high);
}

// What is known of kSlice queries so far. Everything is transposed: a row per channel, a column per query.
struct Slice {
  std::vector<Lanes> query, out;  // [d]; out is not yet divided by sum
  Lanes max, sum;                 // of the logits in log2 units, and Σ 2^(logit - max)
};

// Queries first … first + kSlice of head h; lanes past the end repeat the last query.
inline void load_queries(const Problem<float>& p, int64_t h, int64_t first, Slice& s) {
  s.query.resize(p.d);
  s.out.assign(p.d, all(0));
  s.max = all(-FLT_MAX);
  s.sum = all(0);
  float* to = reinterpret_cast<float*>(s.query.data());
  for (int lane = 0; lane < kSlice; ++lane) {
    const float* query = p.query + p.at(std::min(first + lane, p.queries - 1), h);
    for (int64_t c = 0; c < p.d; ++c) to[c * kSlice + lane] = query[c];
  }
}

inline void store_out(const Problem<float>& p, int64_t h, int64_t first, const Slice& s) {
  const float* from = reinterpret_cast<const float*>(s.out.data());
  const float* sum = reinterpret_cast<const float*>(&s.sum);
  for (int lane = 0; lane < std::min<int64_t>(kSlice, p.queries - first); ++lane) {
    float* out = p.out + p.at(first + lane, h);
    for (int64_t c = 0; c < p.d; ++c) out[c] = from[c * kSlice + lane] / sum[lane];
  }
}
