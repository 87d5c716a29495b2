// correspondence for one instruction set (LR_ISA). Targets lie in SIMD lanes and reference tokens are broadcast, as
// queries and keys in attention_block.h, so a target's best match is a maximum within its lane. A reference token's
// best match is one 64-bit word of similarity and target index. All threads raise it to its maximum, so the result and
// its ties do not depend on their order. It changes only a few times, so mostly one comparison shows that it stays.
#include <algorithm>
#include <cmath>

#include "cpu/attention_block.h"
#include "cpu/launch.h"
#include "cpu/scratch.h"
#include "cpu/simd_convert.h"

namespace lr::LR_ISA {
namespace {

constexpr int64_t kKeys = 64;                 // reference tokens of a block
constexpr int64_t kTargetBytes = 384 << 10;   // of packed targets of a work item: they stay in the L2 cache
constexpr int64_t kSerialProducts = 1 << 20;  // below this, waking a thread costs more than it saves
constexpr int64_t kMeasured = 64;             // tokens of a work item of `measure`

// ---- the best target of a reference token ----

// Orders as (similarity, -target).
uint64_t candidate(float similarity, int64_t target) {
  similarity += 0.0f;  // -0 and 0 tie
  uint32_t u;
  std::memcpy(&u, &similarity, 4);
  u = u >> 31 ? ~u : u | 0x80000000u;
  return uint64_t(u) << 32 | (0xffffffffu - uint32_t(target));
}

float similarity_of(uint64_t best) {
  uint32_t u = uint32_t(best >> 32);
  u = u >> 31 ? u & 0x7fffffffu : ~u;
  float similarity;
  std::memcpy(&similarity, &u, 4);
  return similarity;
}

int64_t target_of(uint64_t best) { return 0xffffffffu - uint32_t(best); }

uint64_t current(const uint64_t* best) { return __atomic_load_n(best, __ATOMIC_RELAXED); }

// Raises `best` to the largest of `count` similarities with the targets from `first` on. A NaN is no candidate.
__attribute__((noinline)) void raise_best(uint64_t* best, Vec a, Vec b, int64_t first, int count) {
  alignas(64) float x[kSlice];
  store(x, a);
  store(x + kLanes, b);
  int lane = -1;
  for (int i = 0; i < count; ++i)
    if (x[i] > (lane < 0 ? -INFINITY : x[lane])) lane = i;
  if (lane < 0) return;
  const uint64_t offer = candidate(x[lane], first + lane);
  uint64_t old = current(best);
  while (offer > old && !__atomic_compare_exchange_n(best, &old, offer, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// ---- tokens ----

// A token x enters the products as the unit vector x * scale * inverse. The scale is a power of two, 1 for usual norms,
// so that neither factor over- or underflows. A zero vector stays zero, one that is not finite becomes NaN.
struct Size {
  float scale, inverse;
};

template <class T>
Size size_of(const T* x, int64_t c) {
  double sum[kLanes] = {};
  float v[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) {
    store_from_float(v, load_as_float(x + i));
    for (int l = 0; l < kLanes; ++l) sum[l] += double(v[l]) * v[l];
  }
  for (; i < c; ++i) sum[0] += double(to_float(x[i])) * to_float(x[i]);
  for (int l = 1; l < kLanes; ++l) sum[0] += sum[l];
  const double norm = std::sqrt(sum[0]);
  if (norm == 0) return {1.0f, 0.0f};
  if (!std::isfinite(norm)) return {1.0f, NAN};
  const double scale =
      norm > 0x1p-40 && norm < 0x1p40 ? 1.0 : std::ldexp(1.0, -std::clamp(std::ilogb(norm), -126, 126));
  return {static_cast<float>(scale), static_cast<float>(1.0 / (norm * scale))};
}

template <class T>
void unit_vector(const T* x, int64_t c, Size size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) store_from_float(to + i, load_as_float(x + i) * size.scale * size.inverse);
  for (; i < c; ++i) to[i] = to_float(x[i]) * size.scale * size.inverse;
}

struct Job {
  const CorrespondenceParams& p;
  Size* size;      // [b or 1, m] of the reference tokens
  uint64_t* best;  // [b, m]
  bool shared;     // whether all rows read one reference row
  int64_t slices;  // of a work item
  int64_t items_per_row;
  int64_t next = 0;
};

template <class T>
const T* reference_token(const CorrespondenceParams& p, int64_t b, int64_t j) {
  return static_cast<const T*>(p.reference) + b * p.reference_stride[0] + j * p.reference_stride[1];
}

template <class T>
void measure(void* context, int64_t item) {
  const Job& job = *static_cast<const Job*>(context);
  const auto& p = job.p;
  const int64_t blocks = (p.m + kMeasured - 1) / kMeasured, b = item / blocks, first = item % blocks * kMeasured;
  for (int64_t j = first; j < std::min(first + kMeasured, p.m); ++j) {
    if (b == 0 || !job.shared) job.size[b * p.m + j] = size_of(reference_token<T>(p, b, j), p.c);
    job.best[b * p.m + j] = candidate(-INFINITY, 0);
  }
}

// ---- products ----

// Of one thread.
struct Scratch {
  float* targets;  // [slices, c, kSlice] unit vectors
  Vec* top;        // [slices, 2] similarity to the best reference token so far, kLanes targets each
  VecInt* index;   // [slices, 2] of that token
  float* keys;     // [kKeys + kKeyTile, c] unit vectors

  Scratch(int64_t slices, int64_t c)
      : memory_(lay_out(
            [&](Arena& arena) {
              arena.take(targets, slices * c * kSlice);
              arena.take(top, 2 * slices);
              arena.take(index, 2 * slices);
              arena.take(keys, (kKeys + kKeyTile) * c);
            },
            allocate)) {}

 private:
  const Memory memory_;
};

// A block of up to kKeys reference tokens, padded to whole tiles.
struct Keys {
  const float* data;     // [count, c]
  uint64_t* best;        // [count]
  int64_t first, count;  // first: index of the first
};

// The targets of one slice, from `first` on, and a block of reference tokens.
void match(const float* targets, int64_t first, int count, const Keys& keys, int c, Vec* tops, VecInt* indices) {
  Vec top[2] = {tops[0], tops[1]};
  VecInt index[2] = {indices[0], indices[1]};
  const int64_t bytes = c * int64_t(sizeof(float));
  for (int64_t j = 0; j < keys.count; j += kKeyTile) {
    Vec x[kKeyTile][2];
    score_tile<Fp32>(reinterpret_cast<const char*>(keys.data + j * c), bytes, targets, c, x);
    const int64_t rest = keys.count - j;
#pragma GCC unroll 16
    for (int i = 0; i < kKeyTile; ++i) {
      if (i >= rest) break;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {  // of equal similarities the first stays; a NaN is never the greater
        index[v] = x[i][v] > top[v] ? VecInt{} + int32_t(keys.first + j + i) : index[v];
        top[v] = max(x[i][v], top[v]);
      }
      uint64_t* best = keys.best + j + i;
      const Vec stands = set1(similarity_of(current(best)));
      if (__builtin_expect(any_at_least(x[i][0], stands) || any_at_least(x[i][1], stands), 0))
        raise_best(best, x[i][0], x[i][1], first, count);
    }
  }
  for (int v = 0; v < 2; ++v) {
    tops[v] = top[v];
    indices[v] = index[v];
  }
}

template <class T>
void match_targets(const Job& job, Scratch& scratch, int64_t item) {
  const auto& p = job.p;
  const int64_t b = item / job.items_per_row, start = item % job.items_per_row * job.slices * kSlice;
  const int64_t slices = std::min(job.slices, (p.n - start + kSlice - 1) / kSlice);
  for (int64_t slice = 0; slice < slices; ++slice) {
    for (int64_t lane = 0; lane < kSlice; ++lane) {  // lanes past n repeat the last target
      const int64_t i = std::min(start + slice * kSlice + lane, p.n - 1);
      const T* token = static_cast<const T*>(p.target) + b * p.target_stride[0] + i * p.target_stride[1];
      unit_vector(token, p.c, size_of(token, p.c), scratch.keys + lane * p.c);
    }
    float* to = scratch.targets + slice * p.c * kSlice;
    for (int64_t u = 0; u < p.c; ++u)
      for (int64_t lane = 0; lane < kSlice; ++lane) to[u * kSlice + lane] = scratch.keys[lane * p.c + u];
  }
  std::fill_n(scratch.top, 2 * slices, set1(-INFINITY));
  std::fill_n(scratch.index, 2 * slices, VecInt{});

  for (int64_t first = 0; first < p.m; first += kKeys) {
    const int64_t count = std::min(kKeys, p.m - first);
    const Size* size = job.size + (job.shared ? 0 : b * p.m) + first;
    for (int64_t j = 0; j < count; ++j)
      unit_vector(reference_token<T>(p, b, first + j), p.c, size[j], scratch.keys + j * p.c);
    std::fill_n(scratch.keys + count * p.c, kKeyTile * p.c, 0.0f);
    const Keys keys{scratch.keys, job.best + b * p.m + first, first, count};
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t at = start + s * kSlice;
      match(scratch.targets + s * p.c * kSlice, at, int(std::min<int64_t>(kSlice, p.n - at)), keys, int(p.c),
            scratch.top + 2 * s, scratch.index + 2 * s);
    }
  }

  for (int64_t lane = 0; lane < std::min(slices * kSlice, p.n - start); ++lane) {
    const int64_t at = b * p.n + start + lane;
    p.index[at] = scratch.index[lane / kLanes][lane % kLanes];
    p.consistent[at] = scratch.top[lane / kLanes][lane % kLanes] > -INFINITY;
  }
}

template <class T>
void match_worker(void* context, int64_t) {
  Job& job = *static_cast<Job*>(context);
  Scratch scratch(job.slices, job.p.c);
  const int64_t items = job.p.b * job.items_per_row;
  for (int64_t i; (i = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < items;) match_targets<T>(job, scratch, i);
}

// Clears `consistent` where the way from a target to its best reference token, and from there to that token's best
// target, ends farther from the target than the radius.
void check_row(void* context, int64_t b) {
  const Job& job = *static_cast<const Job*>(context);
  const auto& p = job.p;
  const int64_t radius_squared = p.radius_squared[b * p.radius_stride];
  for (int64_t i = 0; i < p.n; ++i) {
    uint8_t& consistent = p.consistent[b * p.n + i];
    const int64_t back = target_of(job.best[b * p.m + p.index[b * p.n + i]]);
    if (!consistent || back == i) continue;
    const int64_t dy = back / p.columns - i / p.columns, dx = back % p.columns - i % p.columns;
    consistent = dy * dy + dx * dx <= radius_squared;
  }
}

template <class T>
void run(const CorrespondenceParams& p, const Parallel& parallel) {
  const bool shared = p.reference_stride[0] == 0;
  const int threads = double(p.b) * p.n * p.m * p.c < kSerialProducts ? 1 : parallel.threads;
  const int64_t all = (p.n + kSlice - 1) / kSlice;
  int64_t slices = std::clamp<int64_t>(kTargetBytes / (kSlice * p.c * sizeof(float)), 1, all);
  while (slices > 2 && p.b * ((all + slices - 1) / slices) < 4 * threads) slices /= 2;

  Job job{p, nullptr, nullptr, shared, slices, (all + slices - 1) / slices};
  const Memory memory = lay_out(
      [&](Arena& arena) {
        arena.take(job.best, p.b * p.m);
        arena.take(job.size, shared ? p.m : p.b * p.m);
      },
      allocate);
  run_items(parallel, p.b * ((p.m + kMeasured - 1) / kMeasured), threads == 1, measure<T>, &job);
  run_items(parallel, threads, threads == 1, match_worker<T>, &job);
  run_items(parallel, p.b, threads == 1, check_row, &job);
}

}  // namespace

void correspondence_kernel(const CorrespondenceParams& p, const Parallel& parallel) {
  if (p.b == 0 || p.n == 0) return;
  with_element(p.dtype, [&](auto x) { run<decltype(x)>(p, parallel); });
}

}  // namespace lr::LR_ISA
