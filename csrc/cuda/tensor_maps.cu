#include <array>
#include <map>

#include "cuda/launch.h"
#include "cuda/tensor_maps.h"

namespace lr::sm90 {
namespace {

constexpr size_t kMaps = 4096;  // 128 bytes each; when there are so many, all are forgotten

// A function of the driver, which this library does not link.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

CUtensorMapSwizzle swizzle_of(int bytes) {
  return bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : CU_TENSOR_MAP_SWIZZLE_32B;
}

}  // namespace

const char* encode_map(CUtensorMap& map, bool half, const void* data, const int64_t (&dim)[4],
                       const int64_t (&stride)[4], const int (&box)[4], int swizzle) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto replace = driver_function<decltype(&cuTensorMapReplaceAddress)>("cuTensorMapReplaceAddress");
  if (!encode || !replace) return "the driver is older than CUDA 12 and has no tensor maps";
  using Layout = std::array<int64_t, 10>;
  const Layout layout{half,      dim[0],    dim[1],    dim[2], dim[3],
                      stride[1], stride[2], stride[3], box[0], box[2] * 256 + swizzle};
  thread_local std::map<Layout, CUtensorMap> made;  // per thread: no lock
  const auto found = made.find(layout);
  if (found != made.end()) {
    map = found->second;
    return replace(&map, const_cast<void*>(data)) == CUDA_SUCCESS ? nullptr : "cuTensorMapReplaceAddress failed";
  }
  cuuint64_t dims[4], strides[3];
  cuuint32_t boxes[4];
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) dims[i] = dim[i], boxes[i] = box[i];
  for (int i = 0; i < 3; ++i) strides[i] = stride[i + 1];
  const CUresult result =
      encode(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(data), dims, strides, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cuTensorMapEncodeTiled failed";
  if (made.size() >= kMaps) made.clear();
  made[layout] = map;
  return nullptr;
}

}  // namespace lr::sm90
