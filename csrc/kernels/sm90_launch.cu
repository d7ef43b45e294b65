#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sm90_launch.h"

namespace megatron_kanana::sm90 {
namespace {

constexpr int kMaxRank = 5;

// Through the runtime, so that nothing links with the driver's library.
using Encoder = decltype(&cuTensorMapEncodeTiled);

Encoder tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<Encoder>(function);
  }();
  if (encoder == nullptr) {
    throw std::runtime_error(
        "the CUDA driver is older than 12.0; the kernels for Hopper need a newer one");
  }
  return encoder;
}

using Sizes = std::initializer_list<int64_t>;

CUtensorMap tensor_map(CUtensorMapDataType type, int bytes_of_element, const void* data,
                       Sizes sizes, Sizes strides, std::initializer_list<int> box) {
  cuuint64_t sizes_[kMaxRank], strides_[kMaxRank];
  cuuint32_t box_[kMaxRank], element_strides[kMaxRank];
  std::copy(sizes.begin(), sizes.end(), sizes_);
  std::copy(box.begin(), box.end(), box_);
  std::transform(strides.begin(), strides.end(), strides_,
                 [=](int64_t stride) { return bytes_of_element * stride; });
  std::fill_n(element_strides, kMaxRank, 1);
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type, sizes.size(), const_cast<void*>(data), sizes_, strides_, box_, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      bytes_of_element * box_[0] == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("the copy engine refuses a tensor: CUDA driver error " +
                             std::to_string(result));
  }
  return map;
}

}  // namespace

CUtensorMap bf16_tensor_map(const void* data, Sizes sizes, Sizes strides,
                            std::initializer_list<int> box) {
  return tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, sizes, strides, box);
}

CUtensorMap fp32_tensor_map(const void* data, Sizes sizes, Sizes strides,
                            std::initializer_list<int> box) {
  return tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, data, sizes, strides, box);
}

void enter_device() {
  int device = 0;
  cudaGetDevice(&device);
  cudaSetDevice(device);
}

int multiprocessor_count() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

void check_cuda(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace megatron_kanana::sm90
