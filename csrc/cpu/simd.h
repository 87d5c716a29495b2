// A vector of floats for the instruction set this file is compiled for, and the few operations the kernels need.
// GCC vector extensions give + - * and comparisons; intrinsics stand only where they do not. LR_ISA names the
// namespace.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LR_INLINE __attribute__((always_inline)) inline

namespace lr::LR_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));  // wraps, where a VecInt must not overflow

LR_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }  // p aligned to the vector
LR_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
LR_INLINE Vec set1(float x) { return x - Vec{}; }  // not a sum, which would turn -0 into 0

// The larger of a and b; b where either is NaN.
LR_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of a and b; a where either is NaN.
LR_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(b, a);
#elif defined(__AVX2__)
  return _mm256_min_ps(b, a);
#else
  return b < a ? b : a;
#endif
}

LR_INLINE bool any_greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const VecInt greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= greater[i];
  return any != 0;
#endif
}

LR_INLINE bool any_at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)) != 0;
#else
  const VecInt least = a >= b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= least[i];
  return any != 0;
#endif
}

constexpr float kLog2E = 1.44269504088896340736f;  // exp(x) = 2^(x · kLog2E)

// 2^x with a polynomial of the given degree in the fraction of x: relative error 1.2e-7 (degree 6), 7.5e-5 (degree 3,
// enough for bf16). Below -126 the result is 0, with AVX-512 a subnormal number or 0; above 128 it is undefined; NaN
// stays NaN. kRoundBf16 adds half a bf16 unit of a number in [1, 2), so that cutting the low 16 bits rounds.
template <int kDegree, bool kRoundBf16 = false>
LR_INLINE Vec exp2(Vec x) {
  static_assert(kDegree == 3 || kDegree == 6);
  constexpr float kHalfUnit = kRoundBf16 ? 0.00390625f : 0.0f;
#if defined(__AVX512F__)
  Vec p;
  if constexpr (kDegree == 6) {
    const Vec f = _mm512_reduce_ps(x, 0);  // x - round(x): near 0 on both sides of an integer, so 2^-tiny is 1
    p = f * 0.00015337577497120947f + 0.0013399859890341759f;
    p = p * f + 0.009618519805371761f;
    p = p * f + 0.05550329014658928f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + (1.0f + kHalfUnit);
    return _mm512_scalef_ps(p, x - f);
  } else {
    const Vec f = _mm512_reduce_ps(x, 1);  // x - floor(x): scalef takes the floor itself
    p = f * 0.07802452147006989f + 0.22606715559959412f;
    p = p * f + 0.6958335638046265f;
    p = p * f + (0.9999251961708069f + kHalfUnit);
    return _mm512_scalef_ps(p, x);
  }
#else
  const VecInt underflow = x < set1(-126.0f);
  x = max(set1(-126.0f), x);
  const Vec rounded = x + 12583039.0f;  // 1.5 · 2^23 + 127: the integer part, as an exponent, lands in the low bits
  const Vec f = x - (rounded - 12583039.0f);
  Vec p;
  if constexpr (kDegree == 6) {
    p = f * 0.00015337577497120947f + 0.0013399859890341759f;
    p = p * f + 0.009618519805371761f;
    p = p * f + 0.05550329014658928f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + (1.0f + kHalfUnit);
  } else {
    p = f * 0.0551716685295105f + 0.2426111251115799f;
    p = p * f + 0.6932609677314758f;
    p = p * f + (0.9999280571937561f + kHalfUnit);
  }
  p *= (Vec)((VecBits)rounded << 23);  // a product, since a sum of the bits would turn some NaNs into numbers
  return (Vec)((VecInt)p & ~underflow);
#endif
}

// ---- 16-bit storage types ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LR_INLINE float to_float(float x) { return x; }

LR_INLINE float to_float(BFloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

LR_INLINE float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__ARM_NEON)
  __fp16 h;
  std::memcpy(&h, &x.bits, 2);
  return h;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t u =
      magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : magnitude;  // Inf and NaN keep all exponent bits
  float f;
  std::memcpy(&f, &u, 4);
  f = magnitude >= (0x7c00u << 13) ? f : f * 0x1p112f;  // rebias the exponent; exact for subnormals
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

LR_INLINE void from_float(float x, float& out) { out = x; }

LR_INLINE void from_float(float x, BFloat16& out) {  // to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out.bits = std::isnan(x) ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

LR_INLINE void from_float(float x, Float16& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON)
  const __fp16 h = x;
  std::memcpy(&out.bits, &h, 2);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  const float magnitude = std::fabs(x);
  if (!(magnitude < 65520.0f)) {
    out.bits = sign | (std::isnan(x) ? 0x7e00 : 0x7c00);
  } else if (magnitude < 0x1p-14f) {
    out.bits = sign | uint16_t(std::nearbyint(magnitude * 0x1p24f));  // subnormal: a multiple of 2^-24
  } else {
    u = (u & 0x7fffffff) - (112u << 23);
    out.bits = sign | uint16_t((u + 0xfff + ((u >> 13) & 1)) >> 13);
  }
#endif
}

// ---- products of bf16 pairs, accumulated in fp32 ----

#if defined(__AVX512BF16__)
#define LR_HAS_BF16_DOT 1
typedef __m512bh VecPair;  // kLanes pairs (low, high)
LR_INLINE Vec dot(Vec sum, VecPair a, VecPair b) { return _mm512_dpbf16_ps(sum, a, b); }
LR_INLINE VecPair load_pairs(const uint32_t* p) { return (VecPair)_mm512_load_si512(p); }
LR_INLINE void store_pairs(uint32_t* p, VecPair x) { _mm512_store_si512(p, (__m512i)x); }
LR_INLINE VecPair set1_pair(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return (VecPair)_mm512_set1_epi32(x);
}
LR_INLINE VecPair ones() { return (VecPair)_mm512_set1_epi16(0x3f80); }
// Cuts two fp32 vectors to bf16 and interleaves them: a low, b high.
LR_INLINE VecPair cut_pairs(Vec a, Vec b) {
  return (VecPair)_mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LR_HAS_BF16_DOT 1
typedef bfloat16x8_t VecPair;
LR_INLINE Vec dot(Vec sum, VecPair a, VecPair b) { return (Vec)vbfdotq_f32((float32x4_t)sum, a, b); }
LR_INLINE VecPair load_pairs(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
LR_INLINE void store_pairs(uint32_t* p, VecPair x) { vst1q_u32(p, vreinterpretq_u32_bf16(x)); }
LR_INLINE VecPair set1_pair(const void* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return vreinterpretq_bf16_u32(vdupq_n_u32(x));
}
LR_INLINE VecPair ones() {
  uint32_t x = 0x3f803f80u;
  asm("" : "+r"(x));  // GCC 12 emits a wrong fp16 fmov for this constant
  return vreinterpretq_bf16_u32(vdupq_n_u32(x));
}
LR_INLINE VecPair cut_pairs(Vec a, Vec b) {
  return vreinterpretq_bf16_u32(vsriq_n_u32((uint32x4_t)b, (uint32x4_t)a, 16));
}
#else
#define LR_HAS_BF16_DOT 0
#endif

}  // namespace lr::LR_ISA
