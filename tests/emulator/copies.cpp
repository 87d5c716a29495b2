// cp.async and TMA.
#include "block.h"

namespace lr::emulator {

void Block::cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t size) {
  require("cp.async", shared_.in_range(to, size));
  if (bytes && uintptr_t(from) % size) fail("cp.async: source %p is not a multiple of %u", from, size);
  if (bytes && !g_buffers.covers(from, bytes, false)) fail("cp.async: source %p is outside every tensor", from);
  require("cp.async", shared_.free(to));
  shared_.unit(to).pending = true;
  me().copies.push_back({false, to, from, bytes, size, me().copy_groups});
  if (options_.timing == Timing::kEarly) land(me());
}

void Block::cp_async_arrive(uint32_t at) {
  barrier(at, "cp.async.mbarrier.arrive");
  me().copies.push_back({true, at, nullptr, 0, 0, me().copy_groups});
  if (options_.timing == Timing::kEarly) land(me());
}

void Block::cp_async_wait(uint64_t leave) {
  Thread& t = me();
  const uint64_t groups = t.copy_groups - std::min(leave, t.copy_groups);  // that must have landed
  block_until("its groups of copies", [&t, groups] { return t.copies.empty() || t.copies.front().group >= groups; });
}

void Block::cp_async_wait_all() {
  Thread& t = me();
  block_until("its copies", [&t] { return t.copies.empty(); });
}

// The oldest copy of a thread, or its arrival.
void Block::land(Thread& t) {
  const Copy x = t.copies.front();
  t.copies.pop_front();
  if (x.arrival) return arrive(x.target, 1);
  unsigned char data[kUnit] = {};
  std::memcpy(data, x.bytes ? x.source : data, x.bytes);
  shared_.put(x.target, data, x.size);
  shared_.unit(x.target).pending = false;
  shared_.unit(x.target).unfenced = ~0u;
}

void Block::tma_load(uint32_t to, const TensorMap* map, int x, int y, int z, int w, uint32_t at) {
  const char* const name = "cp.async.bulk.tensor";
  barrier(at, name);
  if (map->box[0] * 2 != uint32_t(map->swizzle))
    fail("%s: rows of %u bytes, swizzle %d", name, map->box[0] * 2, map->swizzle);
  if (uintptr_t(map->base) % 16) fail("%s: the tensor starts at %p", name, static_cast<const void*>(map->base));
  for (int i = 1; i < 4; ++i)
    if (map->stride[i] % 16) fail("%s: stride %d is no multiple of 16", name, i);
  for (int i = 0; i < 4; ++i)
    if (map->box[i] < 1 || map->box[i] > 256) fail("%s: box of %u", name, map->box[i]);
  if (to % 128) fail("%s: %u is not a multiple of 128", name, to);
  const uint32_t end = to + map->box_bytes();
  require(name, shared_.in_range(to, kUnit));
  require(name, shared_.in_range(end - kUnit, kUnit));
  for (uint32_t unit = to; unit < end; unit += kUnit) {
    require(name, shared_.free(unit));
    if (shared_.unit(unit).written && shared_.unit(unit).unfenced == ~0u)
      fail("%s: %u was written through the other proxy and not fenced", name, unit);
    shared_.unit(unit).pending = true;
  }
  bulk_.push_back({to, at, map, {x, y, z, w}});
  if (options_.timing == Timing::kEarly) land_bulk(bulk_.size() - 1);
}

void Block::land_bulk(size_t i) {
  const Bulk load = bulk_[i];
  bulk_.erase(bulk_.begin() + i);
  const TensorMap& map = *load.map;
  uint32_t to = load.to;
  for (uint32_t w = 0; w < map.box[3]; ++w)
    for (uint32_t z = 0; z < map.box[2]; ++z)
      for (uint32_t y = 0; y < map.box[1]; ++y)
        for (uint32_t x = 0; x < map.box[0]; x += kUnit / 2, to += kUnit) {
          const uint32_t offset[4] = {x, y, z, w};
          const unsigned char* from = map.base;
          int64_t inside = kUnit / 2;  // elements of this unit
          for (int d = 0; d < 4; ++d) {
            const int64_t at = int64_t(load.at[d]) + offset[d], left = at < 0 ? 0 : int64_t(map.dim[d]) - at;
            inside = d == 0 ? std::min(inside, left) : left > 0 ? inside : 0;
            from += at * int64_t(map.stride[d]);
          }
          unsigned char data[kUnit] = {};
          if (inside > 0) {
            if (!g_buffers.covers(from, 2 * inside, false))
              fail("cp.async.bulk.tensor: source %p is outside every tensor", static_cast<const void*>(from));
            std::memcpy(data, from, 2 * inside);
          }
          const uint32_t place = to ^ (to >> 7 & (map.swizzle / 16 - 1)) << 4;
          shared_.put(place, data, kUnit);
          shared_.unit(place).pending = false;
          shared_.unit(place).unfenced = 0;
        }
  MBarrier& b = barrier(load.barrier, "mbarrier.complete_tx");
  b.bytes -= map.box_bytes();
  settle(b);
}

}  // namespace lr::emulator
