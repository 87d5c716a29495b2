// Descriptions of tensors for TMA, made by the driver.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace lr::sm90 {

// The map of a tensor of four dimensions of fp16 (half) or bf16; strides in bytes, of the first not used. Null, or what
// went wrong. The driver makes a map of each layout once; later tensors of that layout only exchange the address.
const char* encode_map(CUtensorMap& map, bool half, const void* data, const int64_t (&dim)[4],
                       const int64_t (&stride)[4], const int (&box)[4], int swizzle);

}  // namespace lr::sm90
