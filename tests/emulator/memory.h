// Memory of the emulated GPU: which global addresses a kernel may touch, and the state of each 16 bytes of shared
// memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace lr::emulator {

// Global memory that the kernel may touch.
class Buffers {
 public:
  void add(const void* data, size_t bytes, bool writable) {
    if (bytes) ranges_.push_back({uintptr_t(data), uintptr_t(data) + bytes, writable});
  }
  void clear() { ranges_.clear(); }
  bool covers(const void* data, size_t bytes, bool writing) {
    for (size_t i = 0; i < ranges_.size(); ++i) {  // tensors may overlap
      const Range& r = ranges_[i];
      if (uintptr_t(data) < r.begin || uintptr_t(data) + bytes > r.end || (writing && !r.writable)) continue;
      if (i) std::swap(ranges_[i], ranges_[0]);  // the next one is probably there too
      return true;
    }
    return false;
  }

 private:
  struct Range {
    uintptr_t begin, end;
    bool writable;
  };
  std::vector<Range> ranges_;
};
extern Buffers g_buffers;

constexpr uint32_t kMaxShared = 232448;
constexpr uint32_t kUnit = 16;  // bytes whose state is kept together

// Of 16 bytes of shared memory.
struct Unit {
  uint16_t written = 0;   // bit i: byte i holds something
  bool barrier = false;   // an mbarrier lies here
  bool pending = false;   // a copy is on its way
  uint16_t readers = 0;   // products in flight, one per warp, that read it
  uint32_t unfenced = 0;  // warps for which the async proxy would not see what a thread wrote: no fence.proxy.async yet
};

// Every function returns an empty string, or what the kernel did wrong.
class SharedMemory {
 public:
  explicit SharedMemory(uint32_t bytes)
      : data_(kReserved + bytes, 0xff), units_((kReserved + bytes + kUnit - 1) / kUnit) {}

  unsigned char* at(uint32_t address) { return &data_[address]; }
  Unit& unit(uint32_t address) { return units_[address / kUnit]; }
  uint32_t size() const { return uint32_t(data_.size()); }
  std::vector<Unit>& units() { return units_; }

  std::string in_range(uint32_t address, uint32_t bytes) const {
    if (address < kReserved || address + bytes > data_.size()) return text(address) + " is outside shared memory";
    if (address % (bytes < kUnit ? bytes : kUnit)) return text(address) + " is not a multiple of " + text(bytes);
    return "";
  }
  // What may not be overwritten.
  std::string free(uint32_t address) {
    const Unit& u = unit(address);
    if (u.barrier) return text(address) + " is an mbarrier";
    if (u.readers) return text(address) + " is overwritten while a wgmma reads it";
    if (u.pending) return text(address) + " is written twice at once";
    return "";
  }
  std::string store(uint32_t address, const void* from, uint32_t bytes) {
    if (std::string wrong = in_range(address, bytes); !wrong.empty()) return wrong;
    if (std::string wrong = free(address); !wrong.empty()) return wrong;
    put(address, from, bytes);
    unit(address).unfenced = ~0u;
    return "";
  }
  std::string load(uint32_t address, void* to, uint32_t bytes) {
    if (std::string wrong = in_range(address, bytes); !wrong.empty()) return wrong;
    const uint16_t mask = bits(address, bytes);
    if (unit(address).pending || (unit(address).written & mask) != mask)
      return text(address) + " is read before it is written";
    std::memcpy(to, &data_[address], bytes);
    return "";
  }
  void put(uint32_t address, const void* from, uint32_t bytes) {
    std::memcpy(&data_[address], from, bytes);
    unit(address).written |= bits(address, bytes);
  }

 private:
  std::vector<unsigned char> data_;  // at first the bits of a NaN
  std::vector<Unit> units_;

  static uint16_t bits(uint32_t address, uint32_t bytes) { return uint16_t(((1u << bytes) - 1) << address % kUnit); }
  static std::string text(uint32_t x) { return std::to_string(x); }
};

}  // namespace lr::emulator
