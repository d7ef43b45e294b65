// Quantisation to 8 bits in blocks of 128 numbers, of rows, of columns, or both, in one pass.
#include <cuda_runtime.h>

#include "fp8_patches.cuh"
#include "fp8_quantize_blocks.h"
#include "sm90_launch.h"

namespace megatron_kanana {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = Patch::kThreads / kWarp;
constexpr int kWords = Patch::kWords;
constexpr uint32_t kAll = ~0u;
static_assert(kWarp == 2 * Patch::kPatches);

// The exponent, as a float has it, of the scale of a block with this largest magnitude in bf16:
// that of the power of two at or below 448 / largest. 448 is 1.75 * 2^8, and 0x60 is 1.75's
// mantissa: one that is larger costs another power. Where the division would overflow, it is that
// of the largest float.
__device__ __forceinline__ uint32_t scale_exponent(uint32_t largest) {
  constexpr uint32_t kInfinity = 0x7F80, kOne = 127, kLargestExponent = 254;
  if (largest == 0 || largest >= kInfinity) return kOne;
  const uint32_t above = (largest + 0x7F - 0x60) >> 7;
  return min(2 * kOne + 8 - above, kLargestExponent);
}

__device__ __forceinline__ float inverse_scale(uint32_t exponent) {
  constexpr uint32_t kHalfOfSmallest = 0x00400000;  // 2^-127 has no exponent of its own
  return __uint_as_float(exponent == 254 ? kHalfOfSmallest : (254 - exponent) << 23);
}

// The exponents of two blocks.
struct Exponents {
  uint32_t low, high;

  __device__ __forceinline__ explicit Exponents(uint32_t largest)
      : low(scale_exponent(largest & 0x7FFF)), high(scale_exponent(largest >> 16 & 0x7FFF)) {}

  // As two numbers bf16, which have a float's exponent.
  __device__ __forceinline__ uint32_t scales() const { return low << 7 | high << 23; }
};

// Eight blocks' multipliers, from words of two exponents each.
__device__ __forceinline__ void store_inverse_scales(float* to, const uint32_t (&scales)[kWords]) {
  float inverse[Patch::kSize];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    inverse[2 * i] = inverse_scale(scales[i] >> 7 & 0xFF);
    inverse[2 * i + 1] = inverse_scale(scales[i] >> 23);
  }
  auto* const quarters = reinterpret_cast<float4*>(to);
  quarters[0] = {inverse[0], inverse[1], inverse[2], inverse[3]};
  quarters[1] = {inverse[4], inverse[5], inverse[6], inverse[7]};
}

// Exact in bf16 as scales are powers of two, but for products below its smallest, which are zero in
// 8 bits anyway.
__device__ __forceinline__ float2 multiply(uint32_t numbers, uint32_t scales) {
  uint32_t found;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(numbers), "r"(scales));
  return {low_of(found), high_of(found)};
}

// For a word of two rows, the scales of the thread's rows, which 16 neighbours hold together.
__device__ __forceinline__ void scales_of_rows(const Patch& patch, uint32_t (&scales)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    uint32_t of_rows[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t (&row)[kWords] = patch.rows[2 * i + j];
      of_rows[j] = larger(larger(row[0], row[1]), larger(row[2], row[3]));
    }
    scales[i] = larger(join(of_rows[0], of_rows[1]), __byte_perm(of_rows[0], of_rows[1], 0x7632));
  }
#pragma unroll
  for (int step = 1; step < Patch::kPatches; step *= 2) {
#pragma unroll
    for (uint32_t& each : scales) each = larger(each, __shfl_xor_sync(kAll, each, step));
  }
#pragma unroll
  for (uint32_t& each : scales) each = Exponents(each).scales();
}

// For a word of two columns, the scales of the thread's columns, which all warps hold together.
__device__ __forceinline__ void scales_of_columns(const Patch& patch, uint32_t (&scales)[kWords]) {
  __shared__ uint4 of_warps[kWarps][Patch::kPatches];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    uint32_t largest = patch.rows[0][i];
#pragma unroll
    for (int row = 1; row < Patch::kSize; ++row) largest = larger(largest, patch.rows[row][i]);
    scales[i] = larger(largest, __shfl_xor_sync(kAll, largest, Patch::kPatches));
  }
  if (threadIdx.x % kWarp < Patch::kPatches) {
    of_warps[threadIdx.x / kWarp][Patch::column()] = {scales[0], scales[1], scales[2], scales[3]};
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const uint4 other = of_warps[warp][Patch::column()];
    scales[0] = larger(scales[0], other.x);
    scales[1] = larger(scales[1], other.y);
    scales[2] = larger(scales[2], other.z);
    scales[3] = larger(scales[3], other.w);
  }
#pragma unroll
  for (uint32_t& each : scales) each = Exponents(each).scales();
}

__global__ void __launch_bounds__(Patch::kThreads, Patch::kBlocksAtOnce)
    quantize_blocks_kernel(Fp8Blocks blocks) {
  __shared__ Transposition tile;
  const int64_t first_row = int64_t{blockIdx.y} * kFp8BlocksUnit;
  const int64_t first_column = int64_t{blockIdx.x} * kFp8BlocksUnit;
  const int64_t first = first_row * blocks.columns + first_column;
  Patch patch;
  patch.load(static_cast<const __nv_bfloat16*>(blocks.values) + first, blocks.columns);
  uint32_t scales[kWords];
  if (blocks.data != nullptr) {
    scales_of_rows(patch, scales);
    if (Patch::column() == 0) {
      const int64_t row = first_row + Patch::row() * Patch::kSize;
      store_inverse_scales(blocks.inverse_scales + blockIdx.x * blocks.rows + row, scales);
    }
    patch.store_rows(
        static_cast<uint8_t*>(blocks.data) + first, blocks.columns, [&](int i, uint32_t pair) {
          return multiply(pair, __byte_perm(scales[i / 2], 0, i % 2 == 0 ? 0x1010 : 0x3232));
        });
  }
  if (blocks.transposed == nullptr) return;
  scales_of_columns(patch, scales);
  if (Patch::row() == 0) {
    const int64_t column = first_column + Patch::column() * Patch::kSize;
    store_inverse_scales(blocks.transposed_inverse_scales + blockIdx.y * blocks.columns + column,
                         scales);
  }
  patch.put_columns(tile, [&](int word, uint32_t pair) { return multiply(pair, scales[word]); });
  __syncthreads();
  tile.store(static_cast<uint8_t*>(blocks.transposed) + first_column * blocks.rows + first_row,
             blocks.rows);
}

}  // namespace

void fp8_quantize_blocks(const Fp8Blocks& blocks, void* stream) {
  const dim3 tiles(static_cast<unsigned>(blocks.columns / kFp8BlocksUnit),
                   static_cast<unsigned>(blocks.rows / kFp8BlocksUnit));
  quantize_blocks_kernel<<<tiles, Patch::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(blocks);
  sm90::check_cuda("fp8_quantize_blocks");
}

}  // namespace megatron_kanana
