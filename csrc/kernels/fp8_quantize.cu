// Quantisation to 8 bits of rows, in one pass at the speed of memory.
#include <cuda_runtime.h>

#include "elements.cuh"
#include "fp8_experts.h"
#include "fp8_quantization.cuh"
#include "sm90_launch.h"

namespace megatron_kanana {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kAtOnce = 8;                            // numbers of a thread: 16 bytes of bf16
constexpr int kBlockThreads = kScaleBlock / kAtOnce;  // that share a scale

using Values = Elements<true>;
static_assert(Values::kCount == kAtOnce);

__device__ __forceinline__ Values load_values(const __nv_bfloat16* values) {
  return Values(__ldg(reinterpret_cast<const uint4*>(values)));
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
  const Values loaded = load_values(values + piece * kAtOnce);
  const uint32_t group = 0xFFFFu << (threadIdx.x % kWarp / kBlockThreads * kBlockThreads);
  const float scale =
      scale_of(largest_of_neighbours<kBlockThreads>(largest_of(loaded.values), group));
  data[piece] = quantize(loaded.values, inverse_of(scale));
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
  float largest = 0.0f;
  for (int piece = lane; piece < pieces; piece += kWarp) {
    largest = fmaxf(largest, largest_of(load_values(values + piece * kAtOnce).values));
  }
  largest = largest_of_neighbours<kWarp>(largest, ~0u);
  const float scale = largest > 0.0f ? scale_of(largest) : kScaleOfZeros;
  const float inverse = inverse_of(scale);
  for (int piece = lane; piece < pieces; piece += kWarp) {
    data[row * pieces + piece] = quantize(load_values(values + piece * kAtOnce).values, inverse);
  }
  for (int block = lane; block < blocks; block += kWarp) scales[row * blocks + block] = scale;
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

}  // namespace megatron_kanana
