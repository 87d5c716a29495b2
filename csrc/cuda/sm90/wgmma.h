// wgmma: the product of 64 x 16 and 16 x N numbers by a warpgroup, added to 64 x N sums in fp32. The instruction runs
// while the threads go on; wgmma_fence, wgmma_commit and wgmma_wait of device.h put it in order. The assembler wants
// each of the N / 2 registers that hold a thread's sums by its number, so every N is written out by macros.
#pragma once
#include <cstdint>

namespace lr::sm90 {

// add(d, a, b, accumulate): d = a * b + (accumulate ? d : 0). a: four registers with two numbers each, or a descriptor
// of 64 x 16 numbers in shared memory whose channels are contiguous. b: a descriptor; Transposed: of its two dimensions
// N is the contiguous one. Half: fp16, else bf16.
template <int N, bool Half, bool Transposed>
struct Wgmma;

#define LR_N(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define LR_D(i) "+f"(d[i])
#define LR_TEN(t) \
  LR_D(t##0), LR_D(t##1), LR_D(t##2), LR_D(t##3), LR_D(t##4), LR_D(t##5), LR_D(t##6), LR_D(t##7), LR_D(t##8), LR_D(t##9)

#define LR_WGMMA_ASM(N, TYPE, OPERANDS, PREDICATE, FLAGS, ...)                                          \
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, " PREDICATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k16.f32." TYPE "." TYPE " {" LR_NAMES_##N "}, " OPERANDS ", p, 1, 1, " FLAGS ";}"       \
               : LR_SUMS_##N                                                                            \
               : __VA_ARGS__, "r"(int(accumulate)), "n"(int(Transposed)))

// R0 to R6: the seven numbers after those of the sums.
#define LR_WGMMA(N, R0, R1, R2, R3, R4, R5, R6)                                                                        \
  template <bool Half, bool Transposed>                                                                                \
  struct Wgmma<N, Half, Transposed> {                                                                                  \
    __device__ __forceinline__ static void add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,                  \
                                               bool accumulate) {                                                      \
      if (Half)                                                                                                        \
        LR_WGMMA_ASM(N, "f16", "{%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4, "%" #R5, "%" #R6, "r"(a[0]), "r"(a[1]), \
                     "r"(a[2]), "r"(a[3]), "l"(b));                                                                    \
      else                                                                                                             \
        LR_WGMMA_ASM(N, "bf16", "{%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4, "%" #R5, "%" #R6, "r"(a[0]),           \
                     "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                         \
    }                                                                                                                  \
    __device__ __forceinline__ static void add(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {           \
      if (Half)                                                                                                        \
        LR_WGMMA_ASM(N, "f16", "%" #R0 ", %" #R1, "%" #R2, "0, %" #R3, "l"(a), "l"(b));                                \
      else                                                                                                             \
        LR_WGMMA_ASM(N, "bf16", "%" #R0 ", %" #R1, "%" #R2, "0, %" #R3, "l"(a), "l"(b));                               \
    }                                                                                                                  \
  };

#define LR_NAMES_32 LR_N() ",%10,%11,%12,%13,%14,%15"
#define LR_SUMS_32 LR_TEN(), LR_D(10), LR_D(11), LR_D(12), LR_D(13), LR_D(14), LR_D(15)
LR_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
#define LR_NAMES_40 LR_N() "," LR_N(1)
#define LR_SUMS_40 LR_TEN(), LR_TEN(1)
LR_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
#define LR_NAMES_64 LR_N() "," LR_N(1) "," LR_N(2) ",%30,%31"
#define LR_SUMS_64 LR_TEN(), LR_TEN(1), LR_TEN(2), LR_D(30), LR_D(31)
LR_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
#define LR_NAMES_80 LR_N() "," LR_N(1) "," LR_N(2) "," LR_N(3)
#define LR_SUMS_80 LR_TEN(), LR_TEN(1), LR_TEN(2), LR_TEN(3)
LR_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
#define LR_NAMES_96 LR_N() "," LR_N(1) "," LR_N(2) "," LR_N(3) ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LR_SUMS_96                                                                                                 \
  LR_TEN(), LR_TEN(1), LR_TEN(2), LR_TEN(3), LR_D(40), LR_D(41), LR_D(42), LR_D(43), LR_D(44), LR_D(45), LR_D(46), \
      LR_D(47)
LR_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
#define LR_NAMES_128 LR_N() "," LR_N(1) "," LR_N(2) "," LR_N(3) "," LR_N(4) "," LR_N(5) ",%60,%61,%62,%63"
#define LR_SUMS_128 \
  LR_TEN(), LR_TEN(1), LR_TEN(2), LR_TEN(3), LR_TEN(4), LR_TEN(5), LR_D(60), LR_D(61), LR_D(62), LR_D(63)
LR_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
#define LR_NAMES_160 LR_N() "," LR_N(1) "," LR_N(2) "," LR_N(3) "," LR_N(4) "," LR_N(5) "," LR_N(6) "," LR_N(7)
#define LR_SUMS_160 LR_TEN(), LR_TEN(1), LR_TEN(2), LR_TEN(3), LR_TEN(4), LR_TEN(5), LR_TEN(6), LR_TEN(7)
LR_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
#define LR_NAMES_256                                                                                        \
  LR_N()                                                                                                    \
  "," LR_N(1) "," LR_N(2) "," LR_N(3) "," LR_N(4) "," LR_N(5) "," LR_N(6) "," LR_N(7) "," LR_N(8) "," LR_N( \
      9) "," LR_N(10) "," LR_N(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define LR_SUMS_256                                                                                            \
  LR_TEN(), LR_TEN(1), LR_TEN(2), LR_TEN(3), LR_TEN(4), LR_TEN(5), LR_TEN(6), LR_TEN(7), LR_TEN(8), LR_TEN(9), \
      LR_TEN(10), LR_TEN(11), LR_D(120), LR_D(121), LR_D(122), LR_D(123), LR_D(124), LR_D(125), LR_D(126), LR_D(127)
LR_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef LR_WGMMA
#undef LR_WGMMA_ASM
#undef LR_TEN
#undef LR_D
#undef LR_N
}  // namespace lr::sm90
