// Quantisation to 8 bits in blocks of 128 numbers, of rows, of columns, or both, in one pass.
#include <cuda_runtime.h>

#include "fp8_quantize_blocks.h"
#include "sm90_fp8_patches.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

constexpr uint32_t kAll = ~0u;
static_assert(kFp8BlocksUnit == kScaleBlock);
static_assert(kWarp % kPatches == 0);  // threads of a line are of one warp

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

// Exact in bf16 as scales are powers of two, but for products below its smallest, which are zero in
// 8 bits anyway.
__device__ __forceinline__ float2 multiply(uint32_t numbers, uint32_t scales) {
  uint32_t found;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(numbers), "r"(scales));
  return unpack_bf16(found);
}

// Of a patch's rows, of 2 * i and 2 * i + 1 in word i.
__device__ __forceinline__ void find_largest_of_rows(const Patch& patch,
                                                     uint32_t (&largest)[kPatchWords]) {
#pragma unroll
  for (int i = 0; i < kPatchWords; ++i) {
    uint32_t of_rows[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t (&row)[kPatchWords] = patch.rows[2 * i + j];
      of_rows[j] = larger(larger(row[0], row[1]), larger(row[2], row[3]));
    }
    largest[i] = larger(join_lows(of_rows[0], of_rows[1]), join_highs(of_rows[0], of_rows[1]));
  }
}

// The same of its columns.
__device__ __forceinline__ void find_largest_of_columns(const Patch& patch,
                                                        uint32_t (&largest)[kPatchWords]) {
#pragma unroll
  for (int i = 0; i < kPatchWords; ++i) {
    largest[i] = patch.rows[0][i];
#pragma unroll
    for (int row = 1; row < kPatchSize; ++row) largest[i] = larger(largest[i], patch.rows[row][i]);
  }
}

// The largest of each of four words over 16 neighbouring threads: threads 4 * i to 4 * i + 3 get
// that of word i. In the first exchanges a thread gives its partner the words that the partner is
// to have and keeps the others, so that there are five exchanges instead of 16.
__device__ __forceinline__ uint32_t largest_of_neighbours(const uint32_t (&words)[kPatchWords]) {
  static_assert(kPatches == 16 && kPatchWords == 4);
  const bool upper_half = threadIdx.x & 8, odd_quarter = threadIdx.x & 4;
  uint32_t even = upper_half ? words[2] : words[0], odd = upper_half ? words[3] : words[1];
  even = larger(even, __shfl_xor_sync(kAll, upper_half ? words[0] : words[2], 8));
  odd = larger(odd, __shfl_xor_sync(kAll, upper_half ? words[1] : words[3], 8));
  uint32_t largest = odd_quarter ? odd : even;
  largest = larger(largest, __shfl_xor_sync(kAll, odd_quarter ? even : odd, 4));
  largest = larger(largest, __shfl_xor_sync(kAll, largest, 2));
  return larger(largest, __shfl_xor_sync(kAll, largest, 1));
}

// Eight lines, rows or columns, lie across 16 neighbouring threads. Takes what is largest in a
// thread's part of each line, two lines a word, and gives the lines' scales, as bf16, in its place.
// The threads store the scales' inverses between them.
__device__ __forceinline__ void find_scales(uint32_t (&lines)[kPatchWords], float* inverse_scales) {
  constexpr int kThreadsOfAWord = kPatches / kPatchWords;
  const uint32_t largest = largest_of_neighbours(lines);
  const uint32_t low = scale_exponent(largest & 0x7FFF);
  const uint32_t high = scale_exponent(largest >> 16 & 0x7FFF);
  if (threadIdx.x % kThreadsOfAWord == 0) {
    reinterpret_cast<float2*>(inverse_scales)[threadIdx.x % kPatches / kThreadsOfAWord] = {
        inverse_scale(low), inverse_scale(high)};
  }
  const uint32_t scales = low << 7 | high << 23;  // exponents are where a float has them
#pragma unroll
  for (int i = 0; i < kPatchWords; ++i) {
    lines[i] = __shfl_sync(kAll, scales, i * kThreadsOfAWord, kPatches);
  }
}

__global__ void __launch_bounds__(kPatchThreads, kPatchBlocksAtOnce)
    quantize_blocks_kernel(const __grid_constant__ CUtensorMap map,
                           const __grid_constant__ Fp8Blocks blocks) {
  __shared__ PatchTile tile;
  tile.load(map, blockIdx.y, blockIdx.x);
  // Neighbouring threads have patches along the same eight lines, rows or columns.
  const int line = threadIdx.x / kPatches, place = threadIdx.x % kPatches;
  const int64_t first_row = int64_t{blockIdx.y} * kScaleBlock;
  const int64_t first_column = int64_t{blockIdx.x} * kScaleBlock;
  uint32_t scales[kPatchWords];
  if (blocks.data != nullptr) {
    const Patch patch(tile, line, place);
    const int64_t row = first_row + line * kPatchSize;
    const int64_t column = first_column + place * kPatchSize;
    find_largest_of_rows(patch, scales);
    find_scales(scales, blocks.inverse_scales + blockIdx.x * blocks.rows + row);
    patch.store_rows(
        static_cast<uint8_t*>(blocks.data) + row * blocks.columns + column, blocks.columns,
        [&](int i, uint32_t pair) { return multiply(pair, repeat(scales[i / 2], i % 2 == 1)); });
  }
  if (blocks.transposed != nullptr) {
    const Patch patch(tile, place, line);
    const int64_t row = first_row + place * kPatchSize;
    const int64_t column = first_column + line * kPatchSize;
    find_largest_of_columns(patch, scales);
    find_scales(scales, blocks.transposed_inverse_scales + blockIdx.y * blocks.columns + column);
    patch.store_columns(static_cast<uint8_t*>(blocks.transposed) + column * blocks.rows + row,
                        blocks.rows,
                        [&](int word, uint32_t pair) { return multiply(pair, scales[word]); });
  }
}

}  // namespace
}  // namespace sm90

void fp8_quantize_blocks(const Fp8Blocks& blocks, void* stream) {
  using namespace sm90;
  enter_device();
  const dim3 tiles(static_cast<unsigned>(blocks.columns / kFp8BlocksUnit),
                   static_cast<unsigned>(blocks.rows / kFp8BlocksUnit));
  launch_patches(quantize_blocks_kernel, tiles, stream, "fp8_quantize_blocks",
                 PatchTile::map(blocks.values, blocks.rows, blocks.columns), blocks);
}

}  // namespace megatron_kanana
