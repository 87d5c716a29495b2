#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace lr {

constexpr int kMaxClasses = 256;

struct CompactKeysParams {
  const uint8_t* mask;           // [r or 1, m] 0 or 1, or null: all
  const uint8_t* groups;         // [r or 1, m] bits, or null: seen by every class
  uint8_t classes[kMaxClasses];  // c query group bytes
  int32_t* index;                // [c, r, m] contiguous: the keys that the class sees, ascending, then zeros
  int32_t* count;                // [c, r] contiguous: how many
  int64_t c, r, m;
  int64_t mask_stride, groups_stride;  // row (0 where shared); keys are contiguous
  cudaStream_t stream;
};

// Null, or the error of the launch.
const char* compact_keys_cuda(const CompactKeysParams& p);

}  // namespace lr
