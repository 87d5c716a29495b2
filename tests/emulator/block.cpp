// How a block runs: warps in turn, and what happens by itself.
#include "block.h"

namespace lr::emulator {

Options g_options;
Buffers g_buffers;
Block* g_block = nullptr;

// Something asynchronous that has not happened yet, when nobody can go on without it: if possible what somebody waits
// for, so that everything else comes as late as it may.
bool Block::force_progress() {
  std::set<uint32_t> wanted;
  for (const Thread& t : threads_)
    if (!t.finished && t.waits_at) wanted.insert(t.waits_at);
  for (const bool any : {false, true}) {
    const size_t start = options_.seed ? rng_() % 1024 : 0;
    for (size_t i = 0; i < bulk_.size(); ++i) {
      const size_t j = (start + i) % bulk_.size();
      if (!any && !wanted.count(bulk_[j].barrier)) continue;
      land_bulk(j);
      return true;
    }
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[(start + i) % threads_.size()];
      if (t.copies.empty()) continue;
      size_t end = 0;  // the first arrival, or the end of the first group
      const auto ends = [&t](size_t k) { return t.copies[k].arrival || t.copies[k + 1].group > t.copies[k].group; };
      while (end + 1 < t.copies.size() && !ends(end)) ++end;
      if (!any && !(t.copies[end].arrival && wanted.count(t.copies[end].target))) continue;
      for (size_t k = 0; k <= end; ++k) land(t);
      return true;
    }
  }
  return false;
}

bool Block::some_progress() {
  bool any = false;
  if (options_.timing != Timing::kRandom) return any;
  for (Thread& t : threads_)
    for (; !t.copies.empty() && rng_() % 4; any = true) land(t);
  for (; !bulk_.empty() && rng_() % 2; any = true) land_bulk(rng_() % bulk_.size());
  for (Warp& w : warps_)
    for (; w.executed < w.products.size() && w.products[w.executed].lanes == 32 && rng_() % 3; ++w.executed)
      execute(w, w.products[w.executed]);
  return any;
}

void Block::report_deadlock() {
  std::map<std::string, int> waits;
  for (size_t i = 0; i < threads_.size(); ++i)
    if (!threads_[i].finished) ++waits["warpgroup " + std::to_string(i / 128) + " waits for " + threads_[i].waits_for];
  error_ = "block " + std::to_string(index) + ": deadlock:";
  for (const auto& [what, count] : waits) error_ += " " + what + " (" + std::to_string(count) + " threads);";
}

void Block::check_end() {
  for (const Thread& t : threads_) {
    if (t.issued != t.retired) fail("wgmma still in flight at the end");
    if (!t.copies.empty()) fail("cp.async still in flight at the end");
  }
  if (!bulk_.empty()) fail("cp.async.bulk.tensor still in flight at the end");
  for (int i = 0; i < 16; ++i)
    if (named_[i].arrived) fail("barrier %d: %d threads arrived that nobody waited for", i, named_[i].arrived);
}

void Block::main() {
  Block& block = *g_block;
  Thread& mine = block.me();
  mine.fiber.begun();
  if (block.late_ >> (block.current_ / 32) & 1) block.wait_for_stall();
  block.body_(block.context_);
  mine.finished = true;
  for (;;) mine.fiber.leave();
}

void Block::run(void (*body)(void*), void* context) {
  body_ = body, context_ = context;
  late_ = options_.seed ? rng_() : 0;
  g_block = this;
  for (Thread& t : threads_) t.fiber.start(&Block::main);
  std::vector<int> order(warps_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  uint64_t asleep = 0;  // bit i: warp i goes on only where no other can
  bool stuck = false;
  for (uint64_t round = 0, all_finished = 0; !all_finished; ++round) {
    bool progress = false;
    all_finished = true;
    if (options_.seed) std::shuffle(order.begin(), order.end(), rng_);
    if (options_.seed && round % 16 == 0) asleep = rng_() & rng_();
    for (const int warp : order) {
      if (asleep >> warp & 1 && !stuck) {
        all_finished = false;
        continue;
      }
      for (int lane = 0; lane < 32; ++lane) {
        current_ = warp * 32 + lane;
        Thread& t = threads_[current_];
        if (t.finished) continue;
        all_finished = false;
        if (t.ready && !t.ready(t.ready_argument)) continue;
        progress = true;
        in_fiber_ = true;
        t.fiber.enter();
        in_fiber_ = false;
        if (!error_.empty()) throw std::runtime_error(error_);
      }
    }
    progress |= some_progress();
    if (progress || all_finished) {
      stuck = false;
    } else if (asleep && !stuck) {
      stuck = true;
    } else if (standing_) {
      ++stalls_;
    } else if (!force_progress()) {
      report_deadlock();
      throw std::runtime_error(error_);
    }
  }
  check_end();
}

// ---- What device.h calls

void run_grid(const Grid& grid, void (*body)(void*), void* context) {
  for (int i = 0; i < grid.blocks; ++i) {
    Options mine = g_options;
    if (mine.seed) mine.seed += 7919 * i;
    Block(grid.threads, grid.shared_bytes, grid.registers, i, grid.blocks, mine).run(body, context);
  }
}

int thread_index() { return g_block->thread(); }
int block_index() { return g_block->index; }
int grid_size() { return g_block->grid; }
int thread_count() { return g_block->thread_count(); }
const uint32_t* exchange(uint32_t value) { return g_block->exchange(value); }
void store_shared(uint32_t at, const void* from, uint32_t bytes) { g_block->store_shared(at, from, bytes); }
void load_shared(uint32_t at, void* to, uint32_t bytes) { g_block->load_shared(at, to, bytes); }
void fence_proxy_async() { g_block->fence_proxy_async(); }
void check_global(const char* what, const void* at, size_t bytes, bool writing) {
  if (uintptr_t(at) % bytes) g_block->fail("%s: %p is not a multiple of %zu", what, at, bytes);
  if (!g_buffers.covers(at, bytes, writing)) g_block->fail("%s: %p is outside every tensor", what, at);
}
void named_barrier(int id, int threads, bool wait) { g_block->named(id, threads, wait); }
void mbarrier_init(uint32_t at, uint32_t count) { g_block->mbarrier_init(at, count); }
void mbarrier_arrive(uint32_t at) {
  g_block->arrive(at, 1);
  g_block->stand_still();
}
void mbarrier_arrive_quietly(uint32_t at) { g_block->arrive(at, 1); }
void mbarrier_expect_tx(uint32_t at, int64_t bytes) { g_block->expect_tx(at, bytes); }
void mbarrier_wait(uint32_t at, uint32_t phase, const char* what) { g_block->mbarrier_wait(at, phase, what); }
void cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t size) {
  g_block->cp_async(to, from, bytes, size);
}
void cp_async_arrive(uint32_t at) { g_block->cp_async_arrive(at); }
void cp_async_commit() { g_block->cp_async_commit(); }
void cp_async_wait(uint64_t leave) { g_block->cp_async_wait(leave); }
void cp_async_wait_all() { g_block->cp_async_wait_all(); }
void tma_load(uint32_t to, const TensorMap* map, int x, int y, int z, int w, uint32_t at) {
  g_block->tma_load(to, map, x, y, z, w, at);
}
void set_registers(int count, bool more) { g_block->set_registers(count, more); }
void wgmma_fence() { g_block->wgmma_fence(); }
void wgmma(int n, bool half, bool transposed, bool accumulate, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor) {
  g_block->wgmma(n, half, transposed, accumulate, d, a, a_descriptor, b_descriptor);
}
void wgmma_commit() { g_block->wgmma_commit(); }
void wgmma_wait(int leave) { g_block->wgmma_wait(leave); }

}  // namespace lr::emulator
