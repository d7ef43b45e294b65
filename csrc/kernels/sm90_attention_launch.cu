#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sm90_attention_launch.h"

namespace megatron_kanana::sm90 {
namespace {

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
        "the CUDA driver is older than 12.0; FlashAttention needs a newer one");
  }
  return encoder;
}

}  // namespace

CUtensorMap attention_tensor_map(const AttentionTensor& tensor, int sequence, int batch, int heads,
                                 int width, int rows, int columns) {
  constexpr cuuint64_t kElement = 2;
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride) * kElement; };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(sequence),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {bytes(tensor.sequence_stride), bytes(tensor.head_stride),
                                 bytes(tensor.batch_stride)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, tensor.data, sizes, strides,
                           box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("the copy engine refuses a tensor of attention: CUDA driver error " +
                             std::to_string(result));
  }
  return map;
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

HeadGroups head_groups(int rows, int heads, int multiprocessors) {
  const int group = (multiprocessors + rows - 1) / rows;
  const int tail = 2 * group;
  const int last_group = std::max(0, heads - tail) / group * group;
  return {.rows = rows, .heads = heads, .heads_of_a_group = group, .last_group = last_group};
}

void check_cuda(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace megatron_kanana::sm90
