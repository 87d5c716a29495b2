// step_blend in one launch. Each thread reads 16 bytes of every tensor, or one element where addresses are not aligned.
// It issues all loads but the mask's before it uses the first result, so that their latencies overlap.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda/step_blend.h"

namespace lr {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Four elements of float or eight of 16 bits in the 16 bytes of one store.
__device__ uint32_t word(const float* x, int i, float) { return __float_as_uint(x[i]); }
__device__ uint32_t word(const float* x, int i, __half) {
  const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ uint32_t word(const float* x, int i, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ float not_a_number() { return __int_as_float(0x7fffffff); }

template <class T, int N>
__device__ Pack<T, N> load(const void* base, int64_t at) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(base) + at);
}

// sum + weight * x; x has no effect where its weight is 0, not even a NaN in it.
template <class T, int N>
__device__ void add(float (&sum)[N], float weight, const Pack<T, N>& x) {
  if (weight == 0.0f) return;
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = fmaf(weight, to_float(x.x[i]), sum[i]);
}

// N neighbouring elements of a tensor that may be missing; one of weight 0 is not read.
template <class T, int N>
struct Term {
  Pack<T, N> data;
  bool missing;

  __device__ Term(const void* base, int64_t at, bool read) : missing(read && !base) {
    if (read && base) data = load<T, N>(base, at);
  }

  // NaN where a tensor of another weight than 0 is missing, since nothing here can raise.
  __device__ void add_to(float (&sum)[N], float weight) const { add(sum, missing ? not_a_number() : weight, data); }
};

template <class T, int N>
__device__ void store(void* base, int64_t at, const float (&x)[N]) {
  T* to = static_cast<T*>(base) + at;
  if constexpr (N == 1)
    *to = static_cast<T>(x[0]);
  else
    __stwb(reinterpret_cast<uint4*>(to),  // an assignment becomes four stores
           make_uint4(word(x, 0, T{}), word(x, 1, T{}), word(x, 2, T{}), word(x, 3, T{})));
}

// A call with only sample and predictions, as most calls are. No coefficient decides what is read, so the tensors are
// loaded at the same time as the coefficients and not after them.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    step_blend_plain_kernel(const __grid_constant__ StepBlendCudaParams params, uint32_t blocks) {
  const StepBlendParams& p = params.blend;
  const int64_t row_size = p.c * p.plane, b = blockIdx.x / blocks;
  const int64_t i = (static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x) * N;
  if (i >= row_size) return;
  Pack<T, N> prediction[kMaxPredictions];
  const auto sample = load<T, N>(p.sample, b * p.sample_stride + i);
#pragma unroll
  for (int k = 0; k < kMaxPredictions; ++k)
    if (k < p.predictions) prediction[k] = load<T, N>(p.prediction[k], b * p.prediction_stride[k] + i);
  const int64_t step = params.step ? *params.step : params.row;
  const bool known = step >= 0 && step < params.steps;
  const float* g = p.coefficients + step * params.coefficient_step_stride + b * p.coefficient_stride;
  const auto column = [&](int j) { return known ? __ldg(g + p.predictions + j) : not_a_number(); };
  const float a = column(0), e = column(1);
  float x[N] = {};
  if (e != 0.0f) {
#pragma unroll
    for (int k = 0; k < kMaxPredictions; ++k)
      if (k < p.predictions) add(x, known ? __ldg(g + k) : not_a_number(), prediction[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= e;
  }
  add(x, a, sample);
  if (column(2) != 0.0f || column(3) != 0.0f) {  // noise or history is missing
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = not_a_number();
  }
  const int64_t at = b * row_size + i;
  store<T, N>(p.out, at, x);
  if (p.model_input) {
    const float s = column(8);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= s;
    for (int64_t copy = 0; copy < p.copies; ++copy) store<T, N>(p.model_input, copy * p.b * row_size + at, x);
  }
}

// Any call. A thread block takes kThreads * N elements of one batch row.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    step_blend_kernel(const __grid_constant__ StepBlendCudaParams params, uint32_t blocks) {
  const StepBlendParams& p = params.blend;
  const int64_t row_size = p.c * p.plane, b = blockIdx.x / blocks;
  const int64_t i = (static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x) * N;
  if (i >= row_size) return;
  const int64_t step = params.step ? *params.step : params.row;
  const bool known = step >= 0 && step < params.steps;
  const float* g = p.coefficients + step * params.coefficient_step_stride + b * p.coefficient_stride;
  const auto column = [&](int j) { return known ? __ldg(g + p.predictions + j) : not_a_number(); };
  const bool keep = p.keep_rows && p.keep_rows[b];
  const float e = keep ? 0.0f : column(1), d = keep || !p.history_out ? 0.0f : column(7);
  const bool guided_used = e != 0.0f || d != 0.0f, kept_used = p.background && (keep || p.mask);

  // Loads
  float weight[kMaxPredictions];
  Pack<T, N> prediction[kMaxPredictions];
#pragma unroll
  for (int k = 0; k < kMaxPredictions; ++k) {
    weight[k] = !guided_used || k >= p.predictions ? 0.0f : known ? __ldg(g + k) : not_a_number();
    if (weight[k] != 0.0f) prediction[k] = load<T, N>(p.prediction[k], b * p.prediction_stride[k] + i);
  }
  const float a = keep ? 0.0f : column(0), sigma = keep ? 0.0f : column(2), h = keep ? 0.0f : column(3);
  const float clean_weight = keep || !p.history_out ? 0.0f : column(6);
  const float kept_weight = kept_used ? column(4) : 0.0f, q = kept_used ? column(5) : 0.0f;
  const Term<T, N> sample(p.sample, b * p.sample_stride + i, a != 0.0f || clean_weight != 0.0f);
  const Term<T, N> noise(p.noise, b * p.noise_stride + i, sigma != 0.0f || q != 0.0f);
  const Term<T, N> history(p.history, b * p.history_stride + i, h != 0.0f);
  const Term<T, N> background(p.background, b * p.background_stride + i, kept_weight != 0.0f);

  // Sums
  float guided[N] = {}, x[N] = {};
#pragma unroll
  for (int k = 0; k < kMaxPredictions; ++k) add(guided, weight[k], prediction[k]);
  sample.add_to(x, a);
  if (sigma != 0.0f) noise.add_to(x, sigma);
  if (h != 0.0f) history.add_to(x, h);
  if (e != 0.0f) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = fmaf(e, guided[j], x[j]);
  }
  if (kept_used) {
    float kept[N] = {};
    background.add_to(kept, kept_weight);
    if (q != 0.0f) noise.add_to(kept, q);
    if (keep) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = kept[j];
    } else {
      const auto mask = load<float, N>(p.mask, b * p.mask_stride + i % p.plane);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float m = mask.x[j];
        x[j] = m == 1.0f ? x[j] : m == 0.0f ? kept[j] : m * x[j] + (1.0f - m) * kept[j];
      }
    }
  }
  const int64_t at = b * row_size + i;
  store<T, N>(p.out, at, x);
  if (p.model_input) {
    const float s = column(8);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= s;
    for (int64_t copy = 0; copy < p.copies; ++copy) store<T, N>(p.model_input, copy * p.b * row_size + at, x);
  }
  if (p.history_out) {
    float clean[N] = {};
    sample.add_to(clean, clean_weight);
    if (d != 0.0f) {
#pragma unroll
      for (int j = 0; j < N; ++j) clean[j] = fmaf(d, guided[j], clean[j]);
    }
    store<T, N>(p.history_out, at, clean);
  }
}

// Whether every access of N elements starts at a multiple of its size, and none crosses a row or a plane.
template <class T>
bool fits(const StepBlendParams& p, int64_t n) {
  int64_t bytes = 0;
  int64_t elements = p.plane;
  const auto add = [&](const void* data, int64_t stride) {
    bytes |= reinterpret_cast<int64_t>(data);
    if (data && p.b > 1) elements |= stride;
  };
  add(p.sample, p.sample_stride);
  for (int k = 0; k < p.predictions; ++k) add(p.prediction[k], p.prediction_stride[k]);
  add(p.background, p.background_stride);
  add(p.noise, p.noise_stride);
  add(p.history, p.history_stride);
  for (const void* x : {static_cast<const void*>(p.out), static_cast<const void*>(p.model_input),
                        static_cast<const void*>(p.history_out), static_cast<const void*>(p.mask)})
    bytes |= reinterpret_cast<int64_t>(x);
  return elements % n == 0 && bytes % 16 == 0 && reinterpret_cast<int64_t>(p.mask) % (n * 4) == 0;
}

template <class T, int N>
const char* launch(const StepBlendCudaParams& p) {
  const int64_t blocks = (p.blend.c * p.blend.plane + kThreads * N - 1) / (kThreads * N);
  if (p.blend.b * blocks > 0x7fffffff) return "more than 2147483647 blocks: split the batch";
  const StepBlendParams& x = p.blend;
  const bool plain = !x.mask && !x.background && !x.noise && !x.history && !x.keep_rows && !x.history_out;
  const auto kernel = plain ? step_blend_plain_kernel<T, N> : step_blend_kernel<T, N>;
  kernel<<<static_cast<unsigned>(x.b * blocks), kThreads, 0, p.stream>>>(p, static_cast<uint32_t>(blocks));
  return launch_error();
}

template <class T>
const char* dispatch(const StepBlendCudaParams& p) {
  constexpr int kVector = 16 / sizeof(T);
  return fits<T>(p.blend, kVector) ? launch<T, kVector>(p) : launch<T, 1>(p);
}

}  // namespace

const char* step_blend_cuda(const StepBlendCudaParams& p) {
  if (p.blend.b * p.blend.c * p.blend.plane == 0) return nullptr;
  switch (p.blend.dtype) {
    case DType::kFloat32:
      return dispatch<float>(p);
    case DType::kFloat16:
      return dispatch<__half>(p);
    default:
      return dispatch<__nv_bfloat16>(p);
  }
}

}  // namespace lr
