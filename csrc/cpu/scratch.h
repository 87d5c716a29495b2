// Working memory of one thread, and the copies that fill it.
#pragma once
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "cpu/simd.h"

namespace lr::LR_ISA {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct FreeBuffer {
  void operator()(char* x) const { std::free(x); }
};

// The thread's buffer, kept between calls: a fresh one would cost its page faults every time.
inline char* thread_buffer(size_t bytes) {
  static thread_local std::unique_ptr<char, FreeBuffer> buffer;
  static thread_local size_t capacity = 0;
  if (capacity < bytes) {
    capacity = round_up(bytes, 4096);
    buffer.reset(static_cast<char*>(std::aligned_alloc(4096, capacity)));
  }
  return buffer.get();
}

// Hands out 64-byte aligned arrays; the first pass, without memory, finds how much is needed.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  void take(T*& pointer, size_t count) {
    pointer = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * sizeof(T), 64);
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace lr::LR_ISA
