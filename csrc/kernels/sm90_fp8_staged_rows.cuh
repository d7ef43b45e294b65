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

// 16 columns of bf16, number `sixteen` of 128, as load_matrices finds them, each row times a
// factor.
__device__ __forceinline__ void stage_quantized(uint32_t tile, int sixteen,
                                                const uint32_t (&values)[4],
                                                const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i % 2;
    const float2 pair = unpack_bf16(values[i]);
    store_pair(pair_address(tile, 2 * sixteen + i / 2, half),
               pack_e4m3(pair.x * factors[half], pair.y * factors[half]));
  }
}

// Scales of a thread's two rows from their largest magnitudes, of which one of four threads keeps
// one in memory, times a factor: [rows, blocks], `place` that of the warpgroup's first row.
__device__ __forceinline__ void find_scales(const float (&largest)[2], float (&inverses)[2],
                                            float* place, int blocks, int valid_rows,
                                            const float (&factors)[2] = {1.0f, 1.0f}) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = scale_of(largest_of_row(largest[half]));
    inverses[half] = inverse_of(scale);
    const int row = accumulator_row() + 8 * half;
    if (threadIdx.x % 4 == 0 && row < valid_rows) {
      place[int64_t(row) * blocks] = scale * factors[half];
    }
  }
}

// 128 columns of an accumulator, from register `first` on, each row with a scale of its own, in a
// chunk that KeptRows loads: of each 16 columns a thread has four, 2c, 2c + 1, 2c + 8 and 2c + 9
// (see wgmma), which lie side by side.
template <int kCount>
__device__ __forceinline__ void stage_kept(uint32_t chunk, const float (&sums)[kCount], int first,
                                           float* scales, int blocks, int valid_rows) {
  float largest[2] = {0.0f, 0.0f}, inverses[2];
#pragma unroll
  for (int i = 0; i < kScaleBlock / 2; ++i) {
    largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(sums[first + i]));
  }
  find_scales(largest, inverses, scales, blocks, valid_rows);
  uint32_t packed[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // 16 columns of one of two rows
    const float* four = sums + first + i / 2 * 8 + i % 2 * 2;
    const float inverse = inverses[i % 2];
    packed[i / 4][i % 4] =
        pack_e4m3(four[0] * inverse, four[1] * inverse, four[4] * inverse, four[5] * inverse);
  }
  stage_tile(chunk, packed);
}

// The other way: numbers of 128 columns, still to be multiplied by their scales.
class KeptRows {
 public:
  __device__ __forceinline__ void load(uint32_t chunk) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      load_matrices(chunk + part_address(0, part), numbers_[part][0], numbers_[part][1],
                    numbers_[part][2], numbers_[part][3]);
    }
  }
  // Two columns, of 16 number `sixteen`: 2c and 2c + 1, or with `second` those 8 further on; of the
  // thread's upper row, or with `half` its lower.
  __device__ __forceinline__ float2 at(int sixteen, int second, int half) const {
    const uint32_t four = numbers_[sixteen / 2][sixteen % 2 * 2 + half];
    return unpack_e4m3(second == 0 ? four & 0xFFFF : four >> 16);
  }

 private:
  uint32_t numbers_[4][4];
};

}  // namespace megatron_kanana::sm90
