// Working memory, and the arrays that lie in it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace lr::LR_ISA {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// All types here are in an unnamed namespace, so that each instruction set gets its own std::unique_ptr. Of a template
// with types that all share, the linker keeps one copy, which may use instructions that this processor lacks.
struct Free {
  void operator()(char* x) const { std::free(x); }
};
using Memory = std::unique_ptr<char, Free>;

inline Memory allocate(size_t bytes) {
  constexpr size_t kPage = 4096;
  Memory memory(static_cast<char*>(std::aligned_alloc(kPage, round_up(std::max<size_t>(bytes, 1), kPage))));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// The thread's buffer, kept between calls: a fresh one would cost its page faults every time.
inline char* thread_buffer(size_t bytes) {
  static thread_local Memory buffer;
  static thread_local size_t capacity = 0;
  if (capacity < bytes) {
    capacity = 0;
    buffer = allocate(bytes);
    capacity = bytes;
  }
  return buffer.get();
}

// Hands out 64-byte aligned arrays.
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

// Lays the arrays that take(arena) asks for out in get(bytes), which is `thread_buffer` or `allocate`: a first pass
// finds the bytes.
template <class Take, class Get>
auto lay_out(const Take& take, const Get& get) {
  Arena measure;
  take(measure);
  auto memory = get(measure.used());
  Arena arena(&*memory);
  take(arena);
  return memory;
}

}  // namespace
}  // namespace lr::LR_ISA
