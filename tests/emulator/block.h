// A thread block of a Hopper kernel on the CPU. Threads are fibers; what the hardware does by itself (cp.async, TMA,
// wgmma) happens at any moment that it may choose. What a kernel must not do ends with a message.
//
// What is checked, at the moment it happens:
// - shared memory: out of bounds, misaligned, read before written, read while a copy is on its way, overwritten while a
//   wgmma reads it, read by the async proxy without fence.proxy.async, data over an mbarrier;
// - mbarriers: more arrivals than expected, a wait that is a phase too early or too late (its parity would lie), not
//   initialized;
// - wgmma: descriptors or shapes that the lanes or warps do not share, fields out of range, a missing wgmma.fence,
//   operands in registers that change in flight, sums that are written in flight; sums that are read in flight are a
//   NaN;
// - others: deadlock (with what everybody waits for), named barriers with too many threads or several counts,
// setmaxnreg
//   beyond the register file, global reads and writes outside the tensors of the call.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>

#include "fiber.h"
#include "machine.h"
#include "memory.h"

namespace lr::emulator {

struct MBarrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;  // that TMA has still to write
  uint64_t completed = 0;
};

struct NamedBarrier {
  int count = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Bulk {  // a TMA copy on its way
  uint32_t to, barrier;
  const TensorMap* map;
  int at[4];
};

struct Copy {  // a cp.async on its way, or the arrival that waits for those before it
  bool arrival;
  uint32_t target;  // the data's place, or the mbarrier
  const void* source;
  uint32_t bytes, size;  // that are read, and written: zeros after those that are read
  uint64_t group;
};

// A wgmma of one warp. Its lanes issue it one after the other.
struct Product {
  int n;
  bool half, transposed, a_shared, accumulate;
  uint64_t a_descriptor, b_descriptor;
  int lanes = 0;
  float* d[32];
  const uint32_t* a[32];
  uint32_t a_then[32][4];
  std::vector<uint32_t> units;  // that it reads
  bool done = false;
};

struct Sums {  // registers that a product in flight will write
  float* registers;
  int size;
  std::vector<float> value;
  size_t last;  // product that writes them
};

struct Thread {
  Fiber fiber;
  bool finished = false;
  bool (*ready)(void*) = nullptr;
  void* ready_argument = nullptr;
  const char* waits_for = "";
  uint32_t waits_at = 0;  // mbarrier
  std::deque<Copy> copies;
  uint64_t copy_groups = 0;  // committed so far
  uint64_t exchanges = 0, waits = 0;
  size_t issued = 0;           // products
  std::vector<size_t> groups;  // the end of each committed group of products
  size_t retired = 0;          // products that wait_group has covered
  bool needs_fence = true;
  std::vector<Sums> sums;
};

struct Warp {
  uint64_t posted = 0, fences = 0, waits = 0;
  uint32_t slot[2][32];
  std::deque<Product> products;
  size_t executed = 0;
};

class Block {
 public:
  Block(int threads, uint32_t shared_bytes, int registers, int index, int grid, Options options)
      : index(index),
        grid(grid),
        options_(options),
        rng_(options.seed),
        threads_(threads),
        warps_(threads / 32),
        shared_(shared_bytes),
        registers_(threads / 128, registers),
        register_calls_(threads / 128, 0),
        free_registers_(kRegisterFile - registers * threads) {
    if (threads % 128 || shared_bytes > kMaxShared - kReserved)
      throw std::runtime_error("launch: threads or shared memory");
    if (free_registers_ < 0) throw std::runtime_error("launch: more registers than there are");
  }

  // Runs body in every thread. Throws std::runtime_error with what went wrong.
  void run(void (*body)(void*), void* context);

  const int index, grid;
  int thread() const { return current_; }
  int thread_count() const { return int(threads_.size()); }

  [[noreturn]] void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    error_ = "block " + std::to_string(index) + ", warpgroup " + std::to_string(current_ / 128) + ", warp " +
             std::to_string(current_ / 32 % 4) + ", lane " + std::to_string(current_ % 32) + ": " + text;
    if (!in_fiber_) throw std::runtime_error(error_);
    me().fiber.leave();
    std::abort();
  }
  void require(const char* what, const std::string& wrong) {
    if (!wrong.empty()) fail("%s: %s", what, wrong.c_str());
  }

  template <class Ready>
  void block_until(const char* what, Ready ready) {
    if (ready()) return;
    Thread& t = me();
    t.ready = [](void* r) { return (*static_cast<Ready*>(r))(); };
    t.ready_argument = &ready;
    t.waits_for = what;
    t.fiber.leave();
    t.ready = nullptr;
  }
  // A thread that has just let others go on stands still until nobody can: always, or a quarter of the time.
  void stand_still() {
    if (options_.timing == Timing::kEarly || (options_.timing == Timing::kRandom && rng_() % 4)) return;
    wait_for_stall();
  }

  // ---- Shared memory
  void store_shared(uint32_t at, const void* from, uint32_t bytes) {
    require("st.shared", shared_.store(at, from, bytes));
  }
  void load_shared(uint32_t at, void* to, uint32_t bytes) { require("ld.shared", shared_.load(at, to, bytes)); }
  void fence_proxy_async() {
    if (++warp().fences % 32) return;  // the last lane does it for the warp
    for (Unit& u : shared_.units())
      if (!u.pending) u.unfenced &= ~(1u << (current_ / 32));
  }

  // ---- Copies: copies.cpp
  void cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t size);
  void cp_async_arrive(uint32_t at);
  void cp_async_commit() { ++me().copy_groups; }
  void cp_async_wait(uint64_t leave);
  void cp_async_wait_all();
  void tma_load(uint32_t to, const TensorMap* map, int x, int y, int z, int w, uint32_t at);

  // ---- Barriers, registers, exchanges: barriers.cpp
  void mbarrier_init(uint32_t at, uint32_t count);
  void arrive(uint32_t at, uint32_t count);
  void expect_tx(uint32_t at, int64_t bytes) { barrier(at, "mbarrier.expect_tx").bytes += bytes; }
  void mbarrier_wait(uint32_t at, uint32_t n, const char* what);
  void named(int id, int count, bool wait);
  void set_registers(int count, bool more);
  // Posts a number; returns those of all lanes once all have posted.
  const uint32_t* exchange(uint32_t value);

  // ---- Products: products.cpp
  void wgmma_fence() { me().needs_fence = false; }
  void wgmma(int n, bool half, bool transposed, bool accumulate, float* d, const uint32_t* a, uint64_t a_descriptor,
             uint64_t b_descriptor);
  void wgmma_commit() { me().groups.push_back(me().issued); }
  void wgmma_wait(int leave);

 private:
  static constexpr int kRegisterFile = 65536;

  Thread& me() { return threads_[current_]; }
  Warp& warp() { return warps_[current_ / 32]; }
  static void main();  // of a fiber
  void wait_for_stall() {
    ++standing_;
    block_until("the others", [this, then = stalls_] { return stalls_ > then; });
    --standing_;
  }
  MBarrier& barrier(uint32_t at, const char* what);
  void settle(MBarrier& b);
  void land(Thread& t);
  void land_bulk(size_t i);
  void execute(Warp& w, Product& x);
  bool force_progress();
  bool some_progress();
  void report_deadlock();
  void check_end();

  const Options options_;
  std::mt19937_64 rng_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  std::map<uint32_t, MBarrier> barriers_;
  std::vector<Bulk> bulk_;
  NamedBarrier named_[16];
  std::vector<int> registers_, register_calls_;  // of each warpgroup
  int free_registers_;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  uint64_t late_ = 0;  // bit i: warp i comes last
  int current_ = 0;    // thread
  bool in_fiber_ = false;
  uint64_t stalls_ = 0;  // how often nobody could go on
  int standing_ = 0;     // threads that wait for that
  std::string error_;
};

extern Block* g_block;  // that runs

}  // namespace lr::emulator
