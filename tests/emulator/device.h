// The functions of csrc/cuda/sm90/device.h on the emulator; that file says what they do.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>

#include "machine.h"

#define LR_DEVICE inline
#define LR_KERNEL(threads) inline void
#define LR_PARAMETER const

using cudaStream_t = void*;

namespace lr::sm90 {

using emulator::block_index;
using emulator::grid_size;
using emulator::thread_index;

inline uint32_t bits_of(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float from_bits(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline int shuffle(int x, int lane) { return int(emulator::exchange(uint32_t(x))[lane & 31]); }
inline float shuffle(float x, int lane) { return from_bits(emulator::exchange(bits_of(x))[lane & 31]); }
inline float shuffle_xor(float x, int mask) { return shuffle(x, thread_index() % 32 ^ mask); }
inline double shuffle_xor(double x, int mask) {
  uint32_t half[2];
  std::memcpy(half, &x, 8);
  for (uint32_t& y : half) y = emulator::exchange(y)[thread_index() % 32 ^ mask];
  std::memcpy(&x, half, 8);
  return x;
}
inline int warp_sum(int x) {
  const uint32_t* all = emulator::exchange(uint32_t(x));
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += int(all[i]);
  return sum;
}
inline int sum_before(int x) {
  const uint32_t* all = emulator::exchange(uint32_t(x));
  int sum = 0;
  for (int i = 0; i < thread_index() % 32; ++i) sum += int(all[i]);
  return sum;
}
inline uint32_t ballot(bool x) {
  const uint32_t* all = emulator::exchange(x);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= all[i] << i;
  return bits;
}

inline void sync_warp() { emulator::exchange(0); }

inline uint32_t shared_base() { return emulator::kReserved; }
inline void store_shared(uint32_t at, float x) { emulator::store_shared(at, &x, 4); }
inline void store_shared(uint32_t at, const uint32_t (&x)[4]) { emulator::store_shared(at, x, 16); }
inline void store_zero16(uint32_t at) {
  const uint32_t zero[4] = {};
  emulator::store_shared(at, zero, 16);
}
inline void load_shared(uint32_t at, float& x, float& y) {
  float two[2];
  emulator::load_shared(at, two, 8);
  x = two[0], y = two[1];
}
inline void load_shared(uint32_t at, uint64_t& x) { emulator::load_shared(at, &x, 8); }

inline void sync_block() { emulator::named_barrier(0, emulator::thread_count(), true); }
inline void barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }

inline void mbarrier_init(uint32_t at, int count) { emulator::mbarrier_init(at, count); }
inline void fence_mbarrier_init() {}
using emulator::mbarrier_arrive;
inline void mbarrier_arrive(uint32_t at, int times) {
  for (int i = 0; i + 1 < times; ++i) emulator::mbarrier_arrive_quietly(at);
  emulator::mbarrier_arrive(at);
}
using emulator::mbarrier_wait;
inline void mbarrier_arrive_expect(uint32_t at, int bytes) {
  emulator::mbarrier_expect_tx(at, bytes);
  emulator::mbarrier_arrive(at);
}

template <int Bytes>
void copy_async(uint32_t to, const void* from, bool ok) {
  emulator::cp_async(to, from, ok ? Bytes : 0, Bytes);
}
inline void copy_async_arrive(uint32_t at) { emulator::cp_async_arrive(at); }
inline void copy_async_commit() { emulator::cp_async_commit(); }
template <int Leave>
void copy_async_wait() {
  emulator::cp_async_wait(Leave);
}
inline void copy_async_wait_all() { emulator::cp_async_wait_all(); }
using TensorMap = emulator::TensorMap;
inline void load_box(uint32_t to, const TensorMap* map, int x, int y, int z, int w, uint32_t barrier) {
  emulator::tma_load(to, map, x, y, z, w, barrier);
}
inline void fence_async() { emulator::fence_proxy_async(); }

template <int N>
void more_registers() {
  emulator::set_registers(N, true);
}
template <int N>
void fewer_registers() {
  emulator::set_registers(N, false);
}
template <int N>
void pin(float (&)[N]) {}
inline int forget(int x) { return x; }

template <int N, bool Half, bool Transposed>
struct Wgmma {
  static void add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulator::wgmma(N, Half, Transposed, accumulate, d, a, 0, b);
  }
  static void add(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulator::wgmma(N, Half, Transposed, accumulate, d, nullptr, a, b);
  }
};
inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int Leave>
void wgmma_wait() {
  emulator::wgmma_wait(Leave);
}

template <class T>
T load_global(const T* from) {
  emulator::check_global("ld.global", from, sizeof(T), false);
  return *from;
}
template <class T>
T load_own(const T* from) {
  return load_global(from);
}
template <class T>
void store_global(T* to, T x) {
  emulator::check_global("st.global", to, sizeof(T), true);
  *to = x;
}
inline void store_global(float* to, float x, float y) {
  emulator::check_global("st.global", to, 8, true);
  to[0] = x, to[1] = y;
}
inline int64_t wide_product(int a, int b) { return int64_t(a) * b; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

// Rounds to nearest, ties to even. A poisoned number stays one that is not finite.
template <bool Half>
uint16_t rounded(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  if (x != x) return Half ? 0x7e00 : 0x7fc0;
  if (!Half) return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const float size = std::fabs(x);
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);
  const float step = std::ldexp(1.0f, std::max(exponent, -13) - 11);  // between neighbouring numbers
  const float y = std::nearbyint(size / step) * step;
  if (y < 6.103515625e-05f) return uint16_t(sign | uint32_t(y * 16777216.0f));
  const uint32_t whole = bits_of(y);
  return uint16_t(sign | ((whole >> 23) - 112) << 10 | (whole >> 13 & 1023));
}
template <bool Half>
uint32_t pack(float low, float high) {
  return rounded<Half>(low) | uint32_t(rounded<Half>(high)) << 16;
}
template <bool Half>
float unpack(uint16_t bits) {
  return emulator::number(bits, Half);
}
inline void unpack_float8(uint32_t two, float& low, float& high) {
  const auto number = [](uint32_t bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    if (exponent == 15 && fraction == 7) return from_bits(0x7fffffff);
    const float size = exponent == 0 ? std::ldexp(float(fraction), -9) : std::ldexp(float(8 + fraction), exponent - 10);
    return bits & 0x80 ? -size : size;
  };
  low = number(two & 0xff), high = number(two >> 8 & 0xff);
}

// A call of the tensor map encoder, whose rules TMA checks when it is used.
inline const char* encode_map(TensorMap& map, bool, const void* data, const int64_t (&dim)[4],
                              const int64_t (&stride)[4], const int (&box)[4], int swizzle) {
  map = {static_cast<const unsigned char*>(data), {}, {}, {}, swizzle};
  for (int i = 0; i < 4; ++i) map.dim[i] = dim[i], map.stride[i] = stride[i], map.box[i] = box[i];
  return nullptr;
}

struct Launch {
  int grid, threads, shared_bytes, registers;
  cudaStream_t stream;
};

// Throws what the kernel did wrong.
template <class Parameter>
const char* launch(void (*kernel)(Parameter), std::atomic<uint64_t>&, const Launch& p, const Parameter& x) {
  if (!emulator::g_options.launches) return nullptr;
  auto body = [&] { kernel(x); };
  emulator::run_grid(
      {p.grid, p.threads, uint32_t(p.shared_bytes), p.registers},
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
  return nullptr;
}

}  // namespace lr::sm90
