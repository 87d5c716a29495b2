// Parameters of every native kernel: plain structs, a shape on every pointer. No torch here.
// Sizes: b query rows, n queries, h heads, d head_dim; a source has r rows of m keys. Strides count elements.
#pragma once
#include <cstdint>

namespace lr {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// Runs worker(context, i) for i in [0, count) on the caller's thread pool, in any order.
struct Parallel {
  int32_t threads;
  void (*run)(int64_t count, void (*worker)(void* context, int64_t i), void* context);
};

constexpr int kMaxSources = 16;

struct AttentionSource {
  const void* key;           // [r, m, h, d]
  const void* value;         // [r, m, h, d]
  const int32_t* rows;       // [b] or null: row b, or row 0 where r == 1; -1: this query row does not read the source
  const int32_t* key_index;  // [c or 1, r or 1, m] visible keys of a query class, or null: all
  const int32_t* key_count;  // [c or 1, r or 1]
  const float* key_bias;     // [r or 1, m] or null
  const float* logit_scale;  // [b, h] or null: 1
  const float* logit_bias;   // [b, h] or null: 0
  int64_t r, m;
  int64_t key_stride[3];                                // row, key, head; the last dimension is contiguous
  int64_t value_stride[3];                              // row, key, head
  int64_t index_stride[2];                              // class, row (0 where shared); keys are contiguous
  int64_t count_stride[2];                              // class, row (0 where shared)
  int64_t bias_stride;                                  // row (0 where shared); keys are contiguous
  int64_t logit_scale_stride[2], logit_bias_stride[2];  // b, h
};

struct AttentionParams {
  const void* query;           // [b, n, h, d]
  void* out;                   // [b, n, h, d]
  float* lse;                  // [b, n, h] natural log, or null
  const int32_t* query_order;  // [b or 1, n] queries class by class, or null: one class, in order
  const int32_t* class_start;  // [b or 1, c + 1] where each class starts in query_order
  int64_t b, n, h, d, c;
  int64_t query_stride[3];  // b, n, h; the last dimension is contiguous
  int64_t out_stride[3];    // b, n, h
  int64_t lse_stride[3];    // b, n, h
  int64_t order_stride;     // b (0 where shared)
  int64_t class_stride;     // b (0 where shared)
  AttentionSource source[kMaxSources];
  int32_t sources;
  DType dtype;
  float scale;
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
  bool otsu;
  double threshold;  // used where otsu is false
};

constexpr int kMaxPredictions = 6;

struct StepBlendParams {
  const void* sample;                       // [b, c, plane], as all of its kind: each row contiguous
  const void* prediction[kMaxPredictions];  // k x [b, c, plane]
  const float* coefficients;                // [b or 1, k + 4] of this step: w_0 .. w_{k-1}, a, sigma, p, q
  const float* mask;                        // [b or 1, plane] or null
  const void* background;                   // [b, c, plane], with mask
  const void* noise;                        // [b, c, plane] or null
  void* out;                                // [b, c, plane]
  int64_t b, c, plane;                      // plane = height * width
  int64_t sample_stride, prediction_stride[kMaxPredictions], background_stride, noise_stride, out_stride;  // b
  int64_t coefficient_stride, mask_stride;  // b (0 where shared)
  int32_t predictions;                      // k
  DType dtype;
};

}  // namespace lr
