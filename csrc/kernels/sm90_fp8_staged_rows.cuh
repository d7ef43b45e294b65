// Quantising an accumulator: 64 rows of 128 columns of a warpgroup to 8 bits, a scale a row.
#pragma once

#include "fp8_quantization.cuh"
#include "sm90_staged_rows.cuh"

namespace megatron_kanana::sm90 {

// The largest of the four threads that share a row.
__device__ __forceinline__ float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

// Where two neighbouring columns of one of a thread's rows lie in a swizzled tile of 128 bytes a
// row: `eight` counts blocks of eight columns, `half` is 1 for the row eight further down.
__device__ __forceinline__ uint32_t pair_address(uint32_t tile, int eight, int half) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4 + 8 * half;
  return tile + row * 128 + ((eight / 2) ^ (row % 8)) * 16 + eight % 2 * 8 + lane % 4 * 2;
}

__device__ __forceinline__ void store_pair(uint32_t address, uint16_t pair) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(pair) : "memory");
}

// Scales of a thread's two rows from their largest magnitudes, of which one of four threads keeps
// one in memory: [rows, blocks], `place` that of the warpgroup's first row.
__device__ __forceinline__ void find_scales(const float (&largest)[2], float (&inverses)[2],
                                            float* place, int blocks, int valid_rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = scale_of(largest_of_row(largest[half]));
    inverses[half] = 1.0f / scale;
    const int row = accumulator_row() + 8 * half;
    if (threadIdx.x % 4 == 0 && row < valid_rows) place[int64_t(row) * blocks] = scale;
  }
}

}  // namespace megatron_kanana::sm90
