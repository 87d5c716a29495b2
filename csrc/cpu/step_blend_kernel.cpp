// step_blend for one instruction set (LR_ISA).
#include <algorithm>

#include "cpu/simd_convert.h"
#include "params.h"

namespace lr::LR_ISA {
namespace {

constexpr int kVectors = 4;  // per block: enough independent sums to hide the latency of a multiply-add
constexpr int kBlock = kVectors * kLanes;
constexpr int64_t kSegment = 8192;            // elements of one work item
constexpr int64_t kSerialElements = 1 << 16;  // below this, waking a thread costs more than it saves

template <class T>
struct Term {
  const T* data;
  float weight;
};

template <class T>
struct Sum {
  Term<T> term[kMaxPredictions + 2];
  int count = 0;

  void add(const void* data, int64_t offset, float weight) {
    term[count++] = {static_cast<const T*>(data) + offset, weight};
  }

  // A term of weight 0 is not read.
  void add_nonzero(const void* data, int64_t offset, float weight) {
    if (data && weight != 0.0f) add(data, offset, weight);
  }

  LR_INLINE void block(int64_t i, Vec (&sum)[kVectors]) const {
    for (Vec& x : sum) x = Vec{};
    for (int t = 0; t < count; ++t) {
      const Vec weight = set1(term[t].weight);
      const T* p = term[t].data + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * load_as_float(p + v * kLanes);
    }
  }

  // The same terms over copies of n < kBlock elements from i on.
  Sum tail(int64_t i, int64_t n, T (*copy)[kBlock]) const {
    Sum result;
    for (int t = 0; t < count; ++t) {
      std::memcpy(copy[t], term[t].data + i, n * sizeof(T));
      result.add(copy[t], 0, term[t].weight);
    }
    return result;
  }
};

template <class T>
LR_INLINE void blend_block(const Sum<T>& next, const Sum<T>& kept, const float* mask, int64_t i, T* out) {
  Vec x[kVectors], y[kVectors];
  next.block(i, x);
  if (mask) {
    kept.block(i, y);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec m = load_as_float(mask + i + v * kLanes);
      const Vec mixed = m * x[v] + (1.0f - m) * y[v];
      x[v] = m == 1.0f ? x[v] : (m == 0.0f ? y[v] : mixed);  // a NaN on the side not taken has no effect
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_from_float(out + i + v * kLanes, x[v]);
}

template <class T>
void blend(const Sum<T>& next, const Sum<T>& kept, const float* mask, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) blend_block(next, kept, mask, i, out);
  if (i == n) return;
  T next_copy[kMaxPredictions + 2][kBlock] = {}, kept_copy[2][kBlock] = {}, out_copy[kBlock];
  float mask_copy[kBlock] = {};
  if (mask) std::memcpy(mask_copy, mask + i, (n - i) * sizeof(float));
  blend_block(next.tail(i, n - i, next_copy), kept.tail(i, n - i, kept_copy), mask ? mask_copy : nullptr, 0, out_copy);
  std::memcpy(out + i, out_copy, (n - i) * sizeof(T));
}

struct Work {
  const StepBlendParams& p;
  int64_t c, plane, segments;
};

template <class T>
void segment(void* context, int64_t item) {
  const auto& [p, c, plane, segments] = *static_cast<const Work*>(context);
  const int64_t first = item % segments * kSegment, channel = item / segments % c, b = item / segments / c;
  const int64_t offset = channel * plane + first;
  const float* weight = p.coefficients + b * p.coefficient_stride;
  const float *a = weight + p.predictions, *sigma = a + 1, *keep = a + 2, *renoise = a + 3;
  const int64_t noise_offset = b * p.noise_stride + offset;
  Sum<T> next, kept;
  for (int k = 0; k < p.predictions; ++k)
    next.add_nonzero(p.prediction[k], b * p.prediction_stride[k] + offset, weight[k]);
  next.add_nonzero(p.sample, b * p.sample_stride + offset, *a);
  next.add_nonzero(p.noise, noise_offset, *sigma);
  const float* mask = nullptr;
  if (p.mask) {
    mask = p.mask + b * p.mask_stride + first;
    kept.add(p.background, b * p.background_stride + offset, *keep);
    kept.add_nonzero(p.noise, noise_offset, *renoise);
  }
  T* out = static_cast<T*>(p.out) + b * p.out_stride + offset;
  blend(next, kept, mask, std::min(kSegment, plane - first), out);
}

}  // namespace

void step_blend_kernel(const StepBlendParams& p, const Parallel& parallel) {
  Work work{p, p.c, p.plane, 0};
  if (!p.mask) {  // only a mask tells channels apart
    work.plane *= work.c;
    work.c = 1;
  }
  work.segments = (work.plane + kSegment - 1) / kSegment;
  const int64_t items = p.b * work.c * work.segments;
  const auto worker = p.dtype == DType::kFloat32   ? segment<float>
                      : p.dtype == DType::kFloat16 ? segment<Float16>
                                                   : segment<BFloat16>;
  if (p.b * p.c * p.plane >= kSerialElements && parallel.threads > 1) return parallel.run(items, worker, &work);
  for (int64_t i = 0; i < items; ++i) worker(&work, i);
}

}  // namespace lr::LR_ISA
