// Keys and values in 8 bits with a scale, as the numbers that tiles hold: x · scale in fp32, rounded once to fp16 or
// bf16.
#pragma once
#include "cuda/sm90/device.h"
#include "params.h"

namespace lr::sm90 {

// The scale of a token.
LR_DEVICE float scale_of(const float* scales, const int64_t (&stride)[3], int row, int64_t token, int h) {
  return load_global(scales + row * stride[0] + token * stride[1] + h * stride[2]);
}

// The two numbers in the lower 16 bits.
template <Storage S>
LR_DEVICE void unpack_eight_bit(uint32_t two, float& low, float& high) {
  if (S == Storage::kInt8)
    low = float(int8_t(two)), high = float(int8_t(two >> 8));
  else
    unpack_float8(two, low, high);
}

// Eight channels of a row.
template <bool Half, Storage S>
LR_DEVICE void dequantize(uint64_t bits, float scale, uint32_t (&numbers)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low, high;
    unpack_eight_bit<S>(uint32_t(bits >> 16 * i), low, high);
    numbers[i] = pack<Half>(low * scale, high * scale);
  }
}

// A key or a value in global memory.
struct StoredRow {
  const void* data;  // [d]
  Storage storage;
  float scale;  // of 8 bits

  template <bool Half>
  LR_DEVICE double number(int channel) const {
    if (storage == Storage::kElements)
      return double(unpack<Half>(load_global(static_cast<const uint16_t*>(data) + channel)));
    float low, high;
    const uint32_t bits = load_global(static_cast<const uint8_t*>(data) + channel);
    if (storage == Storage::kInt8)
      unpack_eight_bit<Storage::kInt8>(bits, low, high);
    else
      unpack_eight_bit<Storage::kFloat8>(bits, low, high);
    return double(unpack<Half>(uint16_t(pack<Half>(low * scale, 0))));
  }
};

}  // namespace lr::sm90
