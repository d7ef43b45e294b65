// Quantisation to 8 bits: of rows, in one pass at the speed of memory; of weights, in both orders.
#include <cuda_runtime.h>

#include "fp8_experts.h"
#include "fp8_patches.cuh"
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
    loaded[2 * i] = low_of(words[i]);
    loaded[2 * i + 1] = high_of(words[i]);
  }
}

__device__ __forceinline__ float largest_of(const float (&values)[kAtOnce]) {
  float largest = 0.0f;
#pragma unroll
  for (float value : values) largest = fmaxf(largest, fabsf(value));
  return largest;
}

// Of so many neighbouring threads of a warp, `mask`.
template <int kNeighbours>
__device__ __forceinline__ float largest_of_neighbours(float largest, uint32_t mask) {
#pragma unroll
  for (int distance = kNeighbours / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(mask, largest, distance));
  }
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
  const uint32_t group = 0xFFFFu << (threadIdx.x % kWarp / kBlockThreads * kBlockThreads);
  const float scale = scale_of(largest_of_neighbours<kBlockThreads>(largest_of(loaded), group));
  data[piece] = quantize(loaded, inverse_of(scale));
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
  largest = largest_of_neighbours<kWarp>(largest, ~0u);
  const float scale = largest > 0.0f ? scale_of(largest) : kScaleOfZeros;
  const float inverse = inverse_of(scale);
  for (int piece = lane; piece < pieces; piece += kWarp) {
    load_values(values + piece * kAtOnce, loaded);
    data[row * pieces + piece] = quantize(loaded, inverse);
  }
  for (int block = lane; block < blocks; block += kWarp) scales[row * blocks + block] = scale;
}

// A block of threads for each block of a scale.
__global__ void __launch_bounds__(Patch::kThreads, Patch::kBlocksAtOnce)
    quantize_weights_kernel(const __nv_bfloat16* values, int rows, int columns, uint8_t* data,
                            uint8_t* transposed, float* scales) {
  __shared__ Transposition tile;
  __shared__ float largest_of_warp[Patch::kThreads / kWarp];
  const int64_t matrix = int64_t(blockIdx.z) * rows * columns;
  const int64_t first_row = int64_t(blockIdx.y) * kScaleBlock;
  const int64_t first_column = int64_t(blockIdx.x) * kScaleBlock;
  const int64_t first = matrix + first_row * columns + first_column;
  Patch patch;
  patch.load(values + first, columns);
  uint32_t largest_of_two = 0;
#pragma unroll
  for (const auto& row : patch.rows) {
#pragma unroll
    for (uint32_t word : row) largest_of_two = larger(largest_of_two, word);
  }
  float largest = fmaxf(fabsf(low_of(largest_of_two)), fabsf(high_of(largest_of_two)));
  largest = largest_of_neighbours<kWarp>(largest, ~0u);
  if (threadIdx.x % kWarp == 0) largest_of_warp[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (float other : largest_of_warp) largest = fmaxf(largest, other);
  const float scale = scale_of(largest), inverse = inverse_of(scale);
  const auto scaled = [=](uint32_t pair) {
    return make_float2(low_of(pair) * inverse, high_of(pair) * inverse);
  };
  patch.store_rows(data + first, columns, [&](int, uint32_t pair) { return scaled(pair); });
  patch.put_columns(tile, [&](int, uint32_t pair) { return scaled(pair); });
  __syncthreads();
  tile.store(transposed + matrix + first_column * rows + first_row, rows);
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
  quantize_weights_kernel<<<blocks, Patch::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(values), rows, columns, static_cast<uint8_t*>(data),
      static_cast<uint8_t*>(transposed), scales);
  sm90::check_cuda("fp8_quantize_weights");
}

}  // namespace megatron_kanana
