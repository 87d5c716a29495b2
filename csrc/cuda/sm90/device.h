// What a Hopper attention kernel needs of the machine, as PTX. tests/emulator/device.h has the same functions for a
// machine without a card, so that the kernel's source is one. Shared memory is named by 32-bit addresses only: thus the
// emulator sees every access.
#pragma once
#ifndef __CUDACC__
#include "emulator/device.h"
#else
#include <cuda.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/sm90/wgmma.h"
#include "cuda/tensor_maps.h"

#define LR_DEVICE __device__ __forceinline__
#define LR_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define LR_PARAMETER const __grid_constant__

namespace lr::sm90 {

LR_DEVICE int thread_index() { return threadIdx.x; }
LR_DEVICE int block_index() { return blockIdx.x; }
LR_DEVICE int grid_size() { return gridDim.x; }

// ---- Threads of a warp

LR_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
LR_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
LR_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
LR_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// Sum over the lanes. The compiler knows that it is one value for all of them and keeps what follows from it in uniform
// registers, which saves four instructions at each product.
LR_DEVICE int warp_sum(int x) { return __reduce_add_sync(0xffffffffu, x); }
// Sum over the lanes before this one.
LR_DEVICE int sum_before(int x) {
  const int lane = thread_index() % 32;
  int sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - x;
}
// Bit i: whether lane i says so.
LR_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

// All lanes are here, and see what each of them wrote.
LR_DEVICE void sync_warp() { __syncwarp(); }

// ---- Shared memory

LR_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char lr_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(lr_shared));
}
LR_DEVICE void store_shared(uint32_t at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
LR_DEVICE void store_shared(uint32_t at, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
LR_DEVICE void store_zero16(uint32_t at) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}
LR_DEVICE void load_shared(uint32_t at, float& x, float& y) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at) : "memory");
}
LR_DEVICE void load_shared(uint32_t at, uint64_t& x) {
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(x) : "r"(at) : "memory");
}

// ---- Barriers of several warps

LR_DEVICE void sync_block() { __syncthreads(); }
LR_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LR_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers: 8 bytes of shared memory that count arrivals, and bytes that TMA has written, phase by phase

LR_DEVICE void mbarrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
LR_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LR_DEVICE void mbarrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// So many times.
LR_DEVICE void mbarrier_arrive(uint32_t at, int times) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(times) : "memory");
}
// Arrives, and lets the phase end only when so many bytes more have been written.
LR_DEVICE void mbarrier_arrive_expect(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Waits until phase n (from 0 on) is over. The hardware knows only its parity, so the caller must never be two phases
// away; the emulator checks that. `what` is for the emulator's messages.
LR_DEVICE void mbarrier_wait(uint32_t at, uint32_t n, const char* what) {
  (void)what;
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni OVER;\n"
      "bra.uni AGAIN;\nOVER:\n}" ::"r"(at),
      "r"(n & 1)
      : "memory");
}

// ---- Copies from global to shared memory

// 8 or 16 bytes, or as many zeros. The hint has the L2 cache fetch 256 bytes: neighbouring channels and heads are read
// soon.
template <int Bytes>
LR_DEVICE void copy_async(uint32_t to, const void* from, bool ok) {
  if (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(ok ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(ok ? 8 : 0)
                 : "memory");
}
// Arrives, as one of the expected arrivals, once all copies of this thread so far have landed.
LR_DEVICE void copy_async_arrive(uint32_t at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
// The copies of this thread since the last call are a group.
LR_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Leave` groups of this thread have not landed.
template <int Leave>
LR_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Leave) : "memory");
}
// For all copies, before a thread ends.
LR_DEVICE void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Describes a tensor of four dimensions, and the box of it that one TMA copy takes.
using TensorMap = CUtensorMap;
// A box -> shared memory, zeros where it leaves the tensor, rows swizzled as the map says; the mbarrier counts its
// bytes.
LR_DEVICE void load_box(uint32_t to, const TensorMap* map, int x, int y, int z, int w, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}
// Shows this thread's wgmma, and TMA, what others wrote to shared memory by stores and cp.async.
LR_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Registers of a warpgroup

template <int N>
LR_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
LR_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
// Keeps the compiler from moving uses of the registers over this place.
template <int N>
LR_DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// x, of which the compiler forgets what it knows: what follows from it is computed again, not kept in registers.
LR_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- Products (wgmma.h has the instruction itself)

LR_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LR_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Leave` committed groups of products are in flight.
template <int Leave>
LR_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Leave) : "memory");
}

// ---- Global memory and numbers

// Memory that nobody writes during the kernel.
template <class T>
LR_DEVICE T load_global(const T* from) {
  return __ldg(from);
}
// Memory that this thread wrote earlier in the kernel.
template <class T>
LR_DEVICE T load_own(const T* from) {
  return *from;
}
template <class T>
LR_DEVICE void store_global(T* to, T x) {
  *to = x;
}
LR_DEVICE void store_global(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
// a * b in one instruction; from C++ the compiler made it three.
LR_DEVICE int64_t wide_product(int a, int b) {
  int64_t y;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(y) : "r"(a), "r"(b));
  return y;
}
LR_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LR_DEVICE float log2_fast(float x) { return __log2f(x); }
// Two numbers, rounded to fp16 (Half) or bf16.
template <bool Half>
LR_DEVICE uint32_t pack(float low, float high) {
  uint32_t y;
  if (Half)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <bool Half>
LR_DEVICE float unpack(uint16_t bits) {
  return Half ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t(bits) << 16);
}
// Two numbers of e4m3 in the lower 16 bits.
LR_DEVICE void unpack_float8(uint32_t two, float& low, float& high) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(two)));
  low = unpack<true>(uint16_t(halves)), high = unpack<true>(uint16_t(halves >> 16));
}

// ---- Host: launches. A kernel's shared memory beyond 48 KiB must be allowed once on every device.

struct Launch {
  int grid, threads, shared_bytes, registers;  // registers: of a thread when the kernel starts, for the emulator
  cudaStream_t stream;
};

// Null, or the error of the launch.
template <class Parameter>
const char* launch(void (*kernel)(Parameter), std::atomic<uint64_t>& allowed, const Launch& p, const Parameter& x) {
  int device = 0;
  if (p.shared_bytes > 48 * 1024) {
    if (cudaGetDevice(&device) != cudaSuccess) return launch_error();
    const uint64_t bit = uint64_t(1) << device % 64;
    if (!(allowed.load(std::memory_order_relaxed) & bit)) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes);
      if (const char* error = launch_error()) return error;
      allowed.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  // clang-format off
  kernel<<<p.grid, p.threads, p.shared_bytes, p.stream>>>(x);
  // clang-format on
  return launch_error();
}

}  // namespace lr::sm90
#endif
