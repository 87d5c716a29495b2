// Vectors of floats to and from unaligned memory of any of the three element types.
#pragma once
#include "cpu/simd.h"

namespace lr::LR_ISA {

typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

LR_INLINE Vec load_as_float(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

LR_INLINE Vec load_as_float(const BFloat16* p) {
#if defined(__AVX512F__)
  const auto x = (VecBits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)  // GCC 12 converts a vector in two halves
  const auto x = (VecBits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecHalf half;
  std::memcpy(&half, p, sizeof(half));
  const auto x = __builtin_convertvector(half, VecBits);
#endif
  return (Vec)(x << 16);
}

LR_INLINE Vec load_as_float(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// to[i] = from[i] for i < n.
template <class S>
LR_INLINE void to_floats(const S* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = load_as_float(from + i);
    std::memcpy(to + i, &x, sizeof(x));
  }
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Stores x at p; with kStream past the caches, where x86 can: p is then aligned to x, and a stream_fence follows.
template <bool kStream, class V>
LR_INLINE void put(void* p, V x) {
#if defined(__AVX512F__)
  if constexpr (kStream && sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#endif
#if defined(__AVX2__)
  if constexpr (kStream && sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#endif
#if defined(__SSE2__)
  if constexpr (kStream && sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x);
#endif
  std::memcpy(p, &x, sizeof(x));
}

// Streamed stores become visible to the other threads before what follows.
LR_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool kStream = false>
LR_INLINE void store_from_float(float* p, Vec x) {
  put<kStream>(p, x);
}

template <bool kStream = false>
LR_INLINE void store_from_float(BFloat16* p, Vec x) {  // to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  put<kStream>(p, (__m256i)_mm512_cvtneps_pbh(x));  // subnormal numbers become 0
#else
  const VecBits u = (VecBits)x;
  const VecBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  put<kStream>(p, __builtin_convertvector(x == x ? rounded : VecBits{} + 0x7fc0, VecHalf));
#endif
}

template <bool kStream = false>
LR_INLINE void store_from_float(Float16* p, Vec x) {
#if defined(__AVX512F__)
  put<kStream>(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  put<kStream>(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p[i]);
#endif
}

}  // namespace lr::LR_ISA
