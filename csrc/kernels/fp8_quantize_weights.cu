// Quantisation of weights to 8 bits, with one scale for 128 x 128 of them, in both orders.
#include <cuda_runtime.h>

#include "fp8_experts.h"
#include "sm90_fp8_patches.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

constexpr int kWarps = kPatchThreads / kWarp;

// The largest magnitude in all threads' patches, which are a tile. The threads synchronise in it.
__device__ __forceinline__ float largest_of_tile(const Patch& patch) {
  __shared__ uint32_t largest_of_warp[kWarps];
  uint32_t pair = 0;
#pragma unroll
  for (const auto& row : patch.rows) {
#pragma unroll
    for (uint32_t word : row) pair = larger(pair, word);
  }
  // Numbers that are not negative are in the order of their bits.
  uint32_t largest = __float_as_uint(fmaxf(fabsf(low_of(pair)), fabsf(high_of(pair))));
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % kWarp == 0) largest_of_warp[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (uint32_t other : largest_of_warp) largest = max(largest, other);
  return __uint_as_float(largest);
}

// A block of threads for each block of a scale.
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocksAtOnce)
    quantize_weights_kernel(const __grid_constant__ CUtensorMap map, int rows, int columns,
                            uint8_t* data, uint8_t* transposed, float* scales) {
  __shared__ PatchTile tile;
  const int tile_row = blockIdx.z * gridDim.y + blockIdx.y;  // of all matrices
  tile.load(map, tile_row, blockIdx.x);
  // Neighbouring threads have patches along the same eight lines, rows or columns.
  const int line = threadIdx.x / kPatches, place = threadIdx.x % kPatches;
  const Patch by_row(tile, line, place);
  const float scale = scale_of(largest_of_tile(by_row)), inverse = inverse_of(scale);
  if (threadIdx.x == 0) scales[int64_t{tile_row} * gridDim.x + blockIdx.x] = scale;
  const auto scaled = [=](int, uint32_t pair) {
    return make_float2(low_of(pair) * inverse, high_of(pair) * inverse);
  };
  const int64_t matrix = int64_t{blockIdx.z} * rows * columns;
  const int64_t first_row = int64_t{blockIdx.y} * kScaleBlock;
  const int64_t first_column = int64_t{blockIdx.x} * kScaleBlock;
  const int64_t across = line * kPatchSize, along = place * kPatchSize;
  by_row.store_rows(data + matrix + (first_row + across) * columns + first_column + along, columns,
                    scaled);
  const Patch by_column(tile, place, line);
  by_column.store_columns(transposed + matrix + (first_column + across) * rows + first_row + along,
                          rows, scaled);
}

}  // namespace
}  // namespace sm90

void fp8_quantize_weights(const void* values, int experts, int rows, int columns, void* data,
                          void* transposed, float* scales, void* stream) {
  using namespace sm90;
  if (experts == 0) return;
  enter_device();
  const dim3 tiles(columns / kScaleBlock, rows / kScaleBlock, experts);
  launch_patches(quantize_weights_kernel, tiles, stream, "fp8_quantize_weights",
                 PatchTile::map(values, int64_t{rows} * experts, columns), rows, columns,
                 static_cast<uint8_t*>(data), static_cast<uint8_t*>(transposed), scales);
}

}  // namespace megatron_kanana
