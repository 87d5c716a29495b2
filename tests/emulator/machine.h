// What the emulated GPU offers to device.h: plain functions for the thread that runs. Few headers, since the kernels
// are compiled with it many times.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lr::emulator {

constexpr uint32_t kReserved = 1024;  // bytes of the system, before a kernel's shared memory

// When asynchronous operations happen, and in which order warps run.
enum class Timing { kLate, kEarly, kRandom };
struct Options {
  Timing timing = Timing::kLate;
  uint64_t seed = 0;     // 0: warps in order
  bool launches = true;  // false: kernels do not run, which shows what a call costs beside them
};
extern Options g_options;

// What cuTensorMapEncodeTiled encodes of a tensor of 2-byte elements.
struct TensorMap {
  const unsigned char* base;
  uint64_t dim[4], stride[4];  // strides in bytes; stride[0] is 2
  uint32_t box[4];
  int swizzle;
  int box_bytes() const { return int(box[0] * box[1] * box[2] * box[3] * 2); }
};

// Runs all blocks of a grid, one after the other. Throws std::runtime_error with what the kernel did wrong.
struct Grid {
  int blocks, threads;
  uint32_t shared_bytes;
  int registers;  // of a thread at launch
};
void run_grid(const Grid& grid, void (*body)(void*), void* context);

int thread_index();
int block_index();
int grid_size();
int thread_count();

// Posts a number; returns those of all lanes once all have posted.
const uint32_t* exchange(uint32_t value);

void store_shared(uint32_t at, const void* from, uint32_t bytes);
void load_shared(uint32_t at, void* to, uint32_t bytes);
void fence_proxy_async();
// Fails unless global memory at an address belongs to a tensor of the call.
void check_global(const char* what, const void* at, size_t bytes, bool writing);

void named_barrier(int id, int threads, bool wait);
void mbarrier_init(uint32_t at, uint32_t count);
void mbarrier_arrive(uint32_t at);
void mbarrier_arrive_quietly(uint32_t at);  // another arrival of the same thread follows at once
void mbarrier_expect_tx(uint32_t at, int64_t bytes);
void mbarrier_wait(uint32_t at, uint32_t phase, const char* what);

void cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t size);  // zeros after the bytes
void cp_async_arrive(uint32_t at);
void cp_async_commit();
void cp_async_wait(uint64_t leave);  // groups
void cp_async_wait_all();
void tma_load(uint32_t to, const TensorMap* map, int x, int y, int z, int w, uint32_t at);

void set_registers(int count, bool more);

void wgmma_fence();
// a: registers, or null: a_descriptor.
void wgmma(int n, bool half, bool transposed, bool accumulate, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor);
void wgmma_commit();
void wgmma_wait(int leave);

// fp16 or bf16 -> float.
inline float number(uint16_t x, bool half) {
  uint32_t bits = uint32_t(x) << 16;
  if (half) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) / 16777216.0f;
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  }
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

}  // namespace lr::emulator
