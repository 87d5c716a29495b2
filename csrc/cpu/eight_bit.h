// Rows of keys and values that are stored in 8 bits with a scale, as elements of the query's dtype: x · scale, rounded
// once.
#pragma once
#include <cfloat>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/transpose.h"
#include "params.h"

namespace lr::LR_ISA {

// Beside the overloads of simd.h: in the namespace below these would hide them.
struct Float8 {  // e4m3: no infinity, and NaN where all bits but the sign are set
  uint8_t bits;
};

LR_INLINE float to_float(int8_t x) { return x; }

LR_INLINE float to_float(Float8 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7f) << 20, sign = uint32_t(x.bits & 0x80) << 24;
  if (magnitude == 0x7f << 20) return std::numeric_limits<float>::quiet_NaN();
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p120f;  // rebias the exponent; exact for subnormals
  return sign ? -f : f;
}

LR_INLINE Vec load_as_float(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// Of numbers that are not NaN, divided by 2^8: that is what their bits are as fp16.
LR_INLINE Vec load_as_float(const Float8* p) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(~0x4000)));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(~0x4000)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]) * 0x1p-8f;
  return x;
#endif
}

namespace {

// What a vector of numbers is divided by when it is loaded.
template <class Q>
constexpr float kDivisor = std::is_same_v<Q, Float8> ? 0x1p8f : 1;

LR_INLINE bool has_nan(const int8_t*, int) { return false; }
LR_INLINE bool has_nan(const Float8* from, int d) {
  uint8_t largest = 0;
  for (int c = 0; c < d; ++c) largest = std::max<uint8_t>(largest, from[c].bits & 0x7f);
  return largest == 0x7f;
}

// Whether vectors do what numbers one by one do: the scale times the divisor is finite, and a vector of bf16 would lose
// subnormal products of the smallest number that is not 0.
template <class Q, class S>
LR_INLINE bool suits_vectors(float scale) {
  const float smallest = std::is_same_v<S, BFloat16> ? 0x1p-117f : 0;
  return scale == 0 || (std::fabs(scale) >= smallest && std::fabs(scale) < FLT_MAX / kDivisor<Q>);
}

// to[c] = from[c] · scale for c < d.
template <class Q, class S>
LR_INLINE void dequantize(const Q* from, float scale, int d, S* to) {
  if (d >= kLanes && suits_vectors<Q, S>(scale) && !has_nan(from, d)) {
    const float factor = scale * kDivisor<Q>;
    return channel_groups(d, [&](int64_t c) { store_from_float(to + c, load_as_float(from + c) * factor); });
  }
  for (int c = 0; c < d; ++c) from_float(to_float(from[c]) * scale, to[c]);
}

// A key or a value as it lies in memory.
struct StoredRow {
  const void* data;  // [d]
  float scale;       // of 8 bits
  Storage storage;
};

// The row as elements: where it lies, or in `room`, [d].
template <class S>
LR_INLINE const S* elements_of(const StoredRow& row, int d, S* room) {
  if (__builtin_expect(row.storage == Storage::kElements, 1)) return static_cast<const S*>(row.data);
  if (row.storage == Storage::kInt8)
    dequantize(static_cast<const int8_t*>(row.data), row.scale, d, room);
  else
    dequantize(static_cast<const Float8*>(row.data), row.scale, d, room);
  return room;
}

}  // namespace
}  // namespace lr::LR_ISA
