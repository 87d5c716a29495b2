// Parameters of the CPU kernels, some shared with the CUDA C++ kernels: plain structs, a shape on every pointer, no
// torch. Sizes: b batch rows, n queries, h heads, d head_dim; a source of attention has r rows of m keys and k heads,
// and its values have head_dim e. Strides count elements.
#pragma once
#include <cstdint>

namespace lr {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// Runs worker(context, i) for i in [0, count) on the caller's thread pool, in any order.
struct Parallel {
  int32_t threads;
  void (*run)(int64_t count, void (*worker)(void* context, int64_t i), void* context);
};

constexpr int kMaxHeadDim = 256;
constexpr int kMaxSources = 16;
constexpr int kMaxKeyBlock = 65536;  // keys that an entry of an index list stands for

// How the numbers of a source lie in memory: as the query's, or in 8 bits, of which each token and head has a scale.
enum class Storage : int32_t { kElements, kInt8, kFloat8 };  // float8: e4m3, without infinities

struct AttentionSource {
  const void* key;             // [r, m, k, d]
  const void* value;           // [r, v, k, e], v == m without value_index
  const int32_t* rows;         // [b] or null: row b, or row 0 where r == 1; -1: this batch row does not read the source
  const int32_t* key_index;    // [c or 1, r or 1, h or 1, ⌈m / key_block⌉] visible keys of a query class, or null: all
  const int32_t* key_count;    // [c or 1, r or 1, h or 1]
  const int32_t* key_range;    // [b or 1, n, 2] first key that a query sees and the end of those, or null
  const int32_t* value_index;  // [r or b or 1, m] value token of each key, or null: the key's own
  const float* key_bias;       // [r or 1, m] or null
  const float* logit_scale;    // [b, h] or null: 1
  const float* logit_bias;     // [b, h] or null: 0
  const float* key_scale;      // [r or 1, m or 1, k or 1] of keys in 8 bits: key = 8 bits · scale; else null
  const float* value_scale;    // [r or 1, v or 1, k or 1], likewise
  int64_t r, m, v, k;
  int64_t key_stride[3];                                // row, key, head; the last dimension is contiguous
  int64_t value_stride[3];                              // row, key, head
  int64_t index_stride[3];                              // class, row, head (0 where shared); keys are contiguous
  int64_t count_stride[3];                              // class, row, head (0 where shared)
  int64_t range_stride;                                 // b (0 where shared); the last two dimensions are contiguous
  int64_t value_index_stride[2];                        // row, b: one of them is 0; keys are contiguous
  int64_t bias_rows, bias_stride;                       // 1 or r; row (0 where shared); keys are contiguous
  int64_t logit_scale_stride[2], logit_bias_stride[2];  // b, h
  int64_t key_scale_stride[3], value_scale_stride[3];   // row, token, head (0 where shared)
  int32_t heads_per_key_head;                           // h / k: head i reads head i / heads_per_key_head of the source
  int32_t key_block;                                    // keys of an entry of key_index: a power of two
  Storage storage;                                      // of keys and values
  int32_t softmax_group;                                // from 0 on, ascending over the sources
};

struct AttentionParams {
  const void* query;           // [b, n, h, d]
  void* out;                   // [b, n, h, e]
  void* lse;                   // [b, n, h] natural log, float or double, or null
  const int32_t* query_order;  // [b or 1, n] queries class by class, or null: one class, in order
  const int32_t* class_start;  // [b or 1, c + 1] where each class starts in query_order
  int64_t b, n, h, d, e, c;
  int64_t query_block;      // not 0: class i is of the queries from i · query_block on; without query_order
  int64_t query_stride[3];  // b, n, h; the last dimension is contiguous
  int64_t out_stride[3];    // b, n, h
  int64_t lse_stride[3];    // b, n, h
  int64_t order_stride;     // b (0 where shared)
  int64_t class_stride;     // b (0 where shared)
  AttentionSource source[kMaxSources];
  int32_t sources;
  const float* weight[kMaxSources];       // softmax group x [b, n] or null: 1
  int64_t weight_stride[kMaxSources][2];  // b, n
  int32_t softmax_groups;
  bool lse_is_double;  // the backward pass needs it: the rounding error of a float lse enters P = exp(logit - lse)
  DType dtype;
  float scale;
};

// Gradients of one softmax group without a weight; out, lse and the sources as in the forward pass.
struct AttentionBackwardParams {
  AttentionParams forward;            // out and lse are read
  const void* grad_out;               // [b, n, h, e]
  const float* grad_lse;              // [b, n, h] or null: 0
  void* grad_query;                   // [b, n, h, d] contiguous
  float* grad_key[kMaxSources];       // [r, m, k, d] contiguous, added to
  float* grad_value[kMaxSources];     // [r, v, k, e] contiguous, added to
  float* grad_key_bias[kMaxSources];  // [h, r or 1, m] contiguous, added to; or null
  int64_t grad_out_stride[3];         // b, n, h
  int64_t grad_lse_stride[3];         // b, n, h
};

struct TokenMapsParams {
  const void* query;             // [b, n, h, d]
  const void* key;               // [b, m, h, d]
  const void* value;             // [b, m, h, d]
  const int32_t* token_indices;  // [b, t], each in [0, m)
  void* out;                     // [b, n, h, d]
  float* maps;                   // [b, n, t] contiguous, mean over heads of the probability of the chosen keys
  int64_t b, n, m, h, d, t;
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // b, token, h
  int64_t token_stride;                                                    // b (0 where shared)
  DType dtype;
  float scale;
};

struct SubjectMaskParams {
  const float* maps;  // [b, l, h, w] contiguous
  uint8_t* out;       // [b, out_h, out_w] contiguous, 0 or 1
  int64_t b, l, h, w, out_h, out_w;
  int64_t smoothing;  // side of the mean filter, odd; 1: none
  enum class Level : int32_t { kOtsu, kThreshold, kQuantile } level;
  double value;  // of the threshold or of the quantile
};

constexpr int kMaxPredictions = 6;

struct StepBlendParams {
  const void* sample;                       // [b, c, plane]; here and below each batch row is contiguous
  const void* prediction[kMaxPredictions];  // k x [b, c, plane]
  // [b or 1, k + 9] of this step: g_0 .. g_{k-1}, a, e, sigma, h, p, q, c, d, s, as lr_kernels/reference/denoising.py
  // explains them
  const float* coefficients;
  const float* mask;            // [b or 1, plane] or null
  const void* background;       // [b, c, plane] or null
  const void* noise;            // [b, c, plane] or null
  const void* history;          // [b, c, plane] or null
  const uint8_t* keep_rows;     // [b] or null: rows that take the background whole
  void* out;                    // [b, c, plane] contiguous, as the other outputs
  void* model_input;            // [copies, b, c, plane] or null
  void* history_out;            // [b, c, plane] or null
  int64_t b, c, plane, copies;  // plane = height * width
  int64_t sample_stride, prediction_stride[kMaxPredictions], background_stride, noise_stride, history_stride;  // b
  int64_t coefficient_stride, mask_stride;  // b (0 where shared)
  int32_t predictions;                      // k
  DType dtype;
};

constexpr int kMaxParts = 16;

struct MergeParams {
  const void* part[kMaxParts];       // k x [b, n, h, d]
  const float* part_lse[kMaxParts];  // k x [b, n, h] natural log
  void* out;                         // [b, n, h, d] contiguous
  float* lse;                        // [b, n, h] contiguous
  int64_t b, n, h, d;
  int64_t part_stride[kMaxParts][3];      // b, n, h; the last dimension is contiguous
  int64_t part_lse_stride[kMaxParts][3];  // b, n, h
  int32_t parts;                          // k
  DType dtype;
};

struct AdainTokens {
  const void* data;     // [b or 1, tokens, h, d]
  const uint8_t* mask;  // [b or 1, tokens] 0 or 1, or null: all
  int64_t tokens;
  int64_t stride[3];    // b (0 where shared), token, head; the last dimension is contiguous
  int64_t mask_stride;  // b (0 where shared)
};

struct AdainParams {
  AdainTokens x, reference;
  void* out;  // as x
  int64_t b, h, d;
  int64_t out_stride[3];  // b, token, head
  double eps;
  DType dtype;
};

struct CorrespondenceParams {
  const void* target;             // [b, n, c]
  const void* reference;          // [b or 1, m, c]
  const int64_t* radius_squared;  // [b or 1] in cells of the grid of targets
  int64_t* index;                 // [b, n] contiguous
  uint8_t* consistent;            // [b, n] contiguous, 0 or 1
  int64_t b, n, m, c;
  int64_t target_stride[2], reference_stride[2], radius_stride;  // b (0 where shared), token; channels are contiguous
  int64_t columns;                                               // of the grid
  DType dtype;
};

struct PeakParams {
  int64_t rounds;      // of independent multiply-adds, on every thread
  bool bf16;           // bf16 pairs summed in fp32, else fp32
  double* operations;  // [1] floating-point operations done; 0: the instruction set has no products of bf16 pairs
};

}  // namespace lr

// The CPU kernels: KERNEL(name, parameters, the instruction set whose version runs on a processor with AMX).
// CMakeLists.txt compiles the kernels marked amx for AMX too; its own list of them must agree with this one.
#define LR_CPU_KERNELS(KERNEL)                                                                                    \
  /* multi_source_attention. Scratch: one buffer per thread, at most 1 MiB. */                                    \
  KERNEL(attention, AttentionParams, amx)                                                                         \
  /* Its gradients. Scratch: one buffer per thread, at most 1 MiB. */                                             \
  KERNEL(attention_backward, AttentionBackwardParams, avx512bf16)                                                 \
  /* merge_attention_states: one pass over every part. No scratch. */                                             \
  KERNEL(merge, MergeParams, avx512bf16)                                                                          \
  /* attention_with_token_maps, exact softmax in fp32. Scratch per thread, in floats: 32 * (m + 2 * d) + 128 * t, \
     and 2 * m * d for 16-bit dtypes. */                                                                          \
  KERNEL(token_maps, TokenMapsParams, avx512bf16)                                                                 \
  /* subject_mask, in double. Scratch per row: 8 * (h * w + 2 * out_h * out_w) bytes. */                          \
  KERNEL(subject_mask, SubjectMaskParams, avx512bf16)                                                             \
  /* adain: one pass for the statistics, in double, and one to write. No scratch beyond the stack. */             \
  KERNEL(adain, AdainParams, avx512bf16)                                                                          \
  /* correspondence, in fp32: blocks of both token sets, with the best match of each token so far. Scratch:       \
     16 * m * b bytes, or 8 * m * (b + 1) where all batch rows share one reference row; per thread 384 KiB of     \
     targets (at least 128 * c bytes) and 288 * c bytes of reference tokens. */                                   \
  KERNEL(correspondence, CorrespondenceParams, avx512bf16)                                                        \
  /* step_blend: one pass over every tensor, fp32 sums. No scratch. */                                            \
  KERNEL(step_blend, StepBlendParams, avx512bf16)                                                                 \
  /* For benchmarks: multiply-adds that depend on no memory, as many as this processor can do. */                 \
  KERNEL(peak, PeakParams, amx)
