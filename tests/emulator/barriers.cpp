// mbarriers, named barriers, registers of a warpgroup, and exchanges between the lanes of a warp.
#include "block.h"

namespace lr::emulator {

void Block::mbarrier_init(uint32_t at, uint32_t count) {
  require("mbarrier.init", shared_.in_range(at, 8));
  if (shared_.unit(at).written) fail("mbarrier.init: %u holds data", at);
  if (barriers_.count(at)) fail("mbarrier.init: %u is one already", at);
  shared_.unit(at).barrier = true;
  barriers_[at] = {count, count, 0, 0};
}

MBarrier& Block::barrier(uint32_t at, const char* what) {
  auto it = barriers_.find(at);
  if (it == barriers_.end()) fail("%s: no mbarrier at %u", what, at);
  return it->second;
}

void Block::arrive(uint32_t at, uint32_t count) {
  MBarrier& b = barrier(at, "mbarrier.arrive");
  if (b.pending < count) fail("mbarrier.arrive: more arrivals at %u than the %u expected", at, b.expected);
  b.pending -= count;
  settle(b);
}

void Block::settle(MBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.completed;
  b.pending = b.expected;
}

// n: which phase is waited for, from 0 on. The hardware knows only its parity.
void Block::mbarrier_wait(uint32_t at, uint32_t n, const char* what) {
  MBarrier& b = barrier(at, "mbarrier.try_wait");
  if (b.completed < n)
    fail("mbarrier.try_wait: %s: waits for phase %u in phase %u: the parity lets it pass", what, n,
         unsigned(b.completed));
  me().waits_at = at;
  block_until(what, [&] { return b.completed > n; });
  me().waits_at = 0;
  if (b.completed != n + 1)
    fail("mbarrier.try_wait: %s: phase %u is over, %u begun: the parity would hang", what, n, unsigned(b.completed));
}

void Block::named(int id, int count, bool wait) {
  static const char* const names[16] = {"barrier 0", "barrier 1", "barrier 2", "barrier 3", "barrier 4", "barrier 5"};
  if (id < 0 || id > 15 || count % 32 || count > thread_count()) fail("barrier %d: count %d", id, count);
  NamedBarrier& b = named_[id];
  if (b.arrived && b.count != count) fail("barrier %d: counts %d and %d", id, b.count, count);
  b.count = count;
  const uint64_t generation = b.generation;
  if (++b.arrived == count) b.arrived = 0, ++b.generation;
  if (wait)
    block_until(names[id] ? names[id] : "a barrier", [&b, generation] { return b.generation != generation; });
  else
    stand_still();
}

void Block::set_registers(int count, bool more) {
  const int group = current_ / 128;
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg: %d", count);
  if (++register_calls_[group] % 128) return;  // the last thread of the warpgroup does it
  const int change = (count - registers_[group]) * 128;
  if (more != (change >= 0)) fail("setmaxnreg: %d from %d", count, registers_[group]);
  if (more) block_until("registers", [this, change] { return free_registers_ >= change; });
  free_registers_ -= change;
  registers_[group] = count;
}

const uint32_t* Block::exchange(uint32_t value) {
  Warp& w = warp();
  const uint64_t generation = me().exchanges++;
  w.slot[generation & 1][current_ % 32] = value;
  ++w.posted;
  block_until("the lanes of its warp", [&w, generation] { return w.posted >= 32 * (generation + 1); });
  return w.slot[generation & 1];
}

}  // namespace lr::emulator
