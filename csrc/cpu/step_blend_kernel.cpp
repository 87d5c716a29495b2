// step_blend for one instruction set (LR_ISA).
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>

#include "cpu/launch.h"
#include "cpu/simd_convert.h"

namespace lr::LR_ISA {
namespace {

constexpr int kVectors = 4;  // per block: enough independent sums to hide the latency of a multiply-add
constexpr int kBlock = kVectors * kLanes;
constexpr int64_t kSegment = 8192;              // elements of one work item
constexpr int64_t kSerialElements = 1 << 16;    // below this, waking a thread costs more than it saves
constexpr int64_t kStreamBytes = 8ll << 20;     // an output this large has left the L2 cache before anyone reads it
constexpr int kMaxTerms = kMaxPredictions + 6;  // of all sums of a task together

template <class T>
struct Term {
  const T* data;
  float weight;
};

template <class T>
struct Sum {
  Term<T> term[kMaxPredictions];
  int count = 0;

  // A term that is absent or has coefficient 0 is not read.
  void add(const void* data, int64_t offset, float weight) {
    if (data && weight != 0.0f) term[count++] = {static_cast<const T*>(data) + offset, weight};
  }

  LR_INLINE void add_to(Vec (&sum)[kVectors], int64_t i) const {
    for (int t = 0; t < count; ++t) {
      const Vec weight = set1(term[t].weight);
      const T* p = term[t].data + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * load_as_float(p + v * kLanes);
    }
  }

  // Copies n elements of every term from i on to `copy`, and reads them there from now on.
  void move_to(T (*&copy)[kBlock], int64_t i, int64_t n) {
    for (int t = 0; t < count; ++t, ++copy) {
      std::memcpy(*copy, term[t].data + i, n * sizeof(T));
      term[t].data = *copy;
    }
  }
};

template <bool kStream, class T>
LR_INLINE void store(T* p, const Vec (&x)[kVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_from_float<kStream>(p + v * kLanes, x[v]);
}

LR_INLINE void add_scaled(Vec (&sum)[kVectors], float weight, const Vec (&x)[kVectors]) {
  if (weight == 0.0f) return;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] += set1(weight) * x[v];
}

// Neighbouring elements of one row.
template <class T>
struct Task {
  Sum<T> guided, next, clean, kept;
  float e = 0, d = 0, s = 1;
  const float* mask = nullptr;
  T* out;
  T* model_input;  // or null
  T* history_out;  // or null
  int64_t copies, copy_stride;

  template <bool kStream>
  LR_INLINE void block(int64_t i) const {
    Vec g[kVectors] = {}, x[kVectors] = {};
    guided.add_to(g, i);
    next.add_to(x, i);
    add_scaled(x, e, g);
    if (mask) {
      Vec y[kVectors] = {};
      kept.add_to(y, i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec m = load_as_float(mask + i + v * kLanes);
        const Vec mixed = m * x[v] + (1.0f - m) * y[v];
        x[v] = m == 1.0f ? x[v] : (m == 0.0f ? y[v] : mixed);  // a NaN on the side not taken has no effect
      }
    }
    store<kStream>(out + i, x);
    if (model_input) {
      for (Vec& v : x) v *= set1(s);
      for (int64_t j = 0; j < copies; ++j) store<kStream>(model_input + j * copy_stride + i, x);
    }
    if (history_out) {
      Vec y[kVectors] = {};
      clean.add_to(y, i);
      add_scaled(y, d, g);
      store<kStream>(history_out + i, y);
    }
  }

  // The last n < kBlock elements: a whole block of copies.
  void tail(int64_t i, int64_t n) const {
    T copies_in[kMaxTerms][kBlock] = {}, copies_out[3][kBlock];
    float mask_copy[kBlock] = {};
    Task task = *this;
    T(*copy)[kBlock] = copies_in;
    for (Sum<T>* sum : {&task.guided, &task.next, &task.clean, &task.kept}) sum->move_to(copy, i, n);
    if (mask) {
      std::memcpy(mask_copy, mask + i, n * sizeof(float));
      task.mask = mask_copy;
    }
    task.out = copies_out[0];
    if (model_input) task.model_input = copies_out[1];
    if (history_out) task.history_out = copies_out[2];
    task.copies = 1;
    task.template block<false>(0);
    const auto write = [n](T* p, const T* from) { std::memcpy(p, from, n * sizeof(T)); };
    write(out + i, copies_out[0]);
    for (int64_t j = 0; model_input && j < copies; ++j) write(model_input + j * copy_stride + i, copies_out[1]);
    if (history_out) write(history_out + i, copies_out[2]);
  }

  template <bool kStream>
  void run(int64_t n) const {
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock) block<kStream>(i);
    if (i < n) tail(i, n - i);
    if (kStream) stream_fence();
  }

  // Whether every store of a whole vector is aligned to it.
  bool aligned() const {
    const auto bytes = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(model_input) |
                       reinterpret_cast<uintptr_t>(history_out) | copy_stride * sizeof(T);
    return bytes % (kLanes * sizeof(T)) == 0;
  }
};

// Whether the page at p was written before. The first write to a page brings it into the cache, zeroed; stores past the
// cache then cost more than they save.
bool page_exists(const void* p) {
#if defined(__linux__)
  const uintptr_t size = sysconf(_SC_PAGESIZE), page = reinterpret_cast<uintptr_t>(p) / size * size;
  unsigned char found = 0;
  return mincore(reinterpret_cast<void*>(page), 1, &found) == 0 && (found & 1);
#else
  return true;
#endif
}

struct Work {
  const StepBlendParams& p;
  int64_t c, plane, segments;
  bool stream;
};

template <class T>
void segment(void* context, int64_t item) {
  const auto& [p, c, plane, segments, stream] = *static_cast<const Work*>(context);
  const int64_t first = item % segments * kSegment, channel = item / segments % c, b = item / segments / c;
  const int64_t offset = channel * plane + first, out_offset = b * p.c * p.plane + offset;
  const auto output = [&](void* x) { return x ? static_cast<T*>(x) + out_offset : nullptr; };
  const float* g = p.coefficients + b * p.coefficient_stride;
  const float* column = g + p.predictions;
  const float a = column[0], e = column[1], sigma = column[2], h = column[3], keep = column[4], renoise = column[5],
              clean = column[6], d = column[7], s = column[8];
  Task<T> task;
  task.out = output(p.out);
  task.model_input = output(p.model_input);
  task.history_out = output(p.history_out);
  task.copies = p.copies;
  task.copy_stride = p.b * p.c * p.plane;
  task.s = s;
  const bool keep_row = p.keep_rows && p.keep_rows[b];
  if (keep_row || p.mask) {
    Sum<T>& kept = keep_row ? task.next : task.kept;
    kept.add(p.background, b * p.background_stride + offset, keep);
    kept.add(p.noise, b * p.noise_stride + offset, renoise);
  }
  if (!keep_row) {
    task.e = e;
    task.next.add(p.sample, b * p.sample_stride + offset, a);
    task.next.add(p.noise, b * p.noise_stride + offset, sigma);
    task.next.add(p.history, b * p.history_stride + offset, h);
    if (p.mask) task.mask = p.mask + b * p.mask_stride + first;
    if (p.history_out) {
      task.d = d;
      task.clean.add(p.sample, b * p.sample_stride + offset, clean);
    }
    for (int k = 0; k < p.predictions && (task.e != 0.0f || task.d != 0.0f); ++k)
      task.guided.add(p.prediction[k], b * p.prediction_stride[k] + offset, g[k]);
  }
  const int64_t n = std::min(kSegment, plane - first);
  if (stream && task.aligned()) return task.template run<true>(n);
  task.template run<false>(n);
}

}  // namespace

void step_blend_kernel(const StepBlendParams& p, const Parallel& parallel) {
  const int64_t elements = p.b * p.c * p.plane, bytes = elements * (p.dtype == DType::kFloat32 ? 4 : 2);
  // The middle stands for all: the first page also holds malloc's header
  Work work{p, p.c, p.plane, 0, bytes >= kStreamBytes && page_exists(static_cast<char*>(p.out) + bytes / 2)};
  if (!p.mask) {  // only a mask tells channels apart
    work.plane *= work.c;
    work.c = 1;
  }
  work.segments = (work.plane + kSegment - 1) / kSegment;
  const int64_t items = p.b * work.c * work.segments;
  const auto worker = with_element(p.dtype, [](auto x) { return segment<decltype(x)>; });
  run_items(parallel, items, elements < kSerialElements, worker, &work);
}

}  // namespace lr::LR_ISA
