// Vectors of floats to and from unaligned memory of any of the three element types.
#pragma once
#include "cpu/simd.h"

namespace lr::LR_ISA {

typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

LR_INLINE Vec load_as_float(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

LR_INLINE Vec load_as_float(const BFloat16* p) {
  VecHalf x;
  std::memcpy(&x, p, sizeof(x));
  return (Vec)(__builtin_convertvector(x, VecBits) << 16);
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

LR_INLINE void store_from_float(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

LR_INLINE void store_from_float(BFloat16* p, Vec x) {  // to nearest even; NaN stays NaN
  const VecBits u = (VecBits)x;
  const VecBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VecHalf y = __builtin_convertvector(x == x ? rounded : VecBits{} + 0x7fc0, VecHalf);
  std::memcpy(p, &y, sizeof(y));
}

LR_INLINE void store_from_float(Float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p[i]);
#endif
}

}  // namespace lr::LR_ISA
