// Quantisation to 8 bits: of rows, in one pass at the speed of memory; of weights, in both orders.
#include <cuda_runtime.h>

#include "fp8_experts.h"
#include "fp8_quantization.cuh"
#include "sm90_launch.h"

namespace megatron_kanana {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kAtOnce = 8;                            // numbers of a thread: 16 bytes of bf16
constexpr int kBlockThreads = kScaleBlock / kAtOnce;  // that share a scale

__device__ __forceinline__ void load_values(const __nv_bfloat16* values, float (&loaded)[kAtOnce]) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(values));
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    loaded[2 * i] = __uint_as_float(words[i] << 16);
    loaded[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000);
  }
}

__device__ __forceinline__ float largest_of(const float (&values)[kAtOnce]) {
  float largest = 0.0f;
#pragma unroll
  for (float value : values) largest = fmaxf(largest, fabsf(value));
  return largest;
}

__device__ __forceinline__ uint2 quantize(const float (&values)[kAtOnce], float inverse) {
  float scaled[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) scaled[i] = values[i] * inverse;
  return {pack_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]),
          pack_e4m3(scaled[4], scaled[5], scaled[6], scaled[7])};
}

__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const __nv_bfloat16* values, int64_t pieces, uint2* data, float* scales) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= pieces) return;  // by whole blocks of a scale
  float loaded[kAtOnce];
  load_values(values + piece * kAtOnce, loaded);
  float largest = largest_of(loaded);
  const uint32_t group = 0xFFFFu << (threadIdx.x % kWarp / kBlockThreads * kBlockThreads);
#pragma unroll
  for (int distance = kBlockThreads / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(group, largest, distance));
  }
  const float scale = scale_of(largest);
  data[piece] = quantize(loaded, 1.0f / scale);
  if (threadIdx.x % kBlockThreads == 0) scales[piece / kBlockThreads] = scale;
}

// What meets a row of zeros is multiplied by its scale, and must not decide how others are rounded.
constexpr float kScaleOfZeros = 0x1p-40f;

// By a warp, which reads the row again once it knows its largest number.
__global__ void __launch_bounds__(kThreads)
    quantize_whole_rows_kernel(const __nv_bfloat16* values, int64_t rows, int width, uint2* data,
                               float* scales) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp, pieces = width / kAtOnce, blocks = width / kScaleBlock;
  values += row * width;
  float loaded[kAtOnce], largest = 0.0f;
  for (int piece = lane; piece < pieces; piece += kWarp) {
    load_values(values + piece * kAtOnce, loaded);
    largest = fmaxf(largest, largest_of(loaded));
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  const float scale = largest > 0.0f ? scale_of(largest) : kScaleOfZeros, inverse = 1.0f / scale;
  for (int piece = lane; piece < pieces; piece += kWarp) {
    load_values(values + piece * kAtOnce, loaded);
    data[row * pieces + piece] = quantize(loaded, inverse);
  }
  for (int block = lane; block < blocks; block += kWarp) scales[row * blocks + block] = scale;
}

// A block of threads for each block of a scale.
__global__ void __launch_bounds__(kThreads)
    quantize_weights_kernel(const __nv_bfloat16* values, int rows, int columns, uint8_t* data,
                            uint8_t* transposed, float* scales) {
  constexpr int kRowsAtOnce = kThreads / kBlockThreads;
  constexpr int kPasses = kScaleBlock / kRowsAtOnce;
  constexpr int kStride = kScaleBlock + 4;  // so that columns lie in different banks
  __shared__ float largest_of_warp[kThreads / kWarp];
  __shared__ __align__(8) uint8_t tile[kScaleBlock * kStride];
  const int64_t matrix = int64_t(blockIdx.z) * rows * columns;
  const int first_row = blockIdx.y * kScaleBlock, first_column = blockIdx.x * kScaleBlock;
  const int row = threadIdx.x / kBlockThreads, column = threadIdx.x % kBlockThreads * kAtOnce;
  float loaded[kPasses][kAtOnce];
  float largest = 0.0f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t from = int64_t(first_row + pass * kRowsAtOnce + row) * columns;
    load_values(values + matrix + from + first_column + column, loaded[pass]);
    largest = fmaxf(largest, largest_of(loaded[pass]));
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  if (threadIdx.x % kWarp == 0) largest_of_warp[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (float other : largest_of_warp) largest = fmaxf(largest, other);
  const float scale = scale_of(largest), inverse = 1.0f / scale;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const uint2 packed = quantize(loaded[pass], inverse);
    const int at = pass * kRowsAtOnce + row;
    const int64_t to = matrix + int64_t(first_row + at) * columns + first_column + column;
    *reinterpret_cast<uint2*>(data + to) = packed;
    *reinterpret_cast<uint32_t*>(tile + at * kStride + column) = packed.x;
    *reinterpret_cast<uint32_t*>(tile + at * kStride + column + 4) = packed.y;
  }
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int at = pass * kRowsAtOnce + row;  // a column of the tile, eight rows of it
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      words[i / 4] |= uint32_t(tile[(column + i) * kStride + at]) << (8 * (i % 4));
    }
    const int64_t to = matrix + int64_t(first_column + at) * rows + first_row + column;
    *reinterpret_cast<uint2*>(transposed + to) = {words[0], words[1]};
  }
  if (threadIdx.x == 0) {
    scales[(int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = scale;
  }
}

}  // namespace

void fp8_quantize_rows(const void* values, int64_t rows, int width, void* data, float* scales,
                       void* stream) {
  const int64_t pieces = rows * width / kAtOnce;
  if (pieces == 0) return;
  const auto blocks = static_cast<unsigned>((pieces + kThreads - 1) / kThreads);
  quantize_rows_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(values), pieces, static_cast<uint2*>(data), scales);
  sm90::check_cuda("fp8_quantize_rows");
}

void fp8_quantize_whole_rows(const void* values, int64_t rows, int width, void* data, float* scales,
                             void* stream) {
  if (rows == 0) return;
  constexpr int kRows = kThreads / kWarp;
  const auto blocks = static_cast<unsigned>((rows + kRows - 1) / kRows);
  quantize_whole_rows_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(values), rows, width, static_cast<uint2*>(data), scales);
  sm90::check_cuda("fp8_quantize_whole_rows");
}

void fp8_quantize_weights(const void* values, int experts, int rows, int columns, void* data,
                          void* transposed, float* scales, void* stream) {
  if (experts == 0) return;
  const dim3 blocks(columns / kScaleBlock, rows / kScaleBlock, experts);
  quantize_weights_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(values), rows, columns, static_cast<uint8_t*>(data),
      static_cast<uint8_t*>(transposed), scales);
  sm90::check_cuda("fp8_quantize_weights");
}

}  // namespace megatron_kanana
