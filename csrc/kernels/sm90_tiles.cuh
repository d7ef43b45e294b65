// Tiles in shared memory and rings of stages, as all of Hopper's matrix kernels use them.
#pragma once

#include "sm90_wgmma.cuh"

namespace megatron_kanana::sm90 {

constexpr int kChunk = 64;  // columns of a swizzled chunk of 128 bytes

// Where a ring of stages stands: the stage, and the parity of the phase to wait for.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Makes the barriers of a ring's stages, for so many arrivals. All threads synchronise in it.
template <int kStages>
__device__ __forceinline__ void prepare_stages(uint64_t (&full)[kStages],
                                               uint64_t (&empty)[kStages], uint32_t full_arrivals,
                                               uint32_t empty_arrivals) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], full_arrivals);
      barrier_init(&empty[stage], empty_arrivals);
    }
    barrier_init_fence();
  }
  __syncthreads();
}

// Where a lane's row of part `i` lies, 16 columns of 64 rows of a warpgroup, in swizzled chunks of
// 64 columns: as store_matrices asks for.
__device__ __forceinline__ uint32_t part_address(uint32_t tile, int i) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane % 16;
  const int column16 = 2 * i + lane / 16;  // in units of 8 columns, 16 bytes
  return tile + column16 / 8 * 64 * 128 + row * 128 + ((column16 % 8) ^ (row % 8)) * 16;
}

// Writes a warpgroup's 64 rows of bf16, two columns packed. The order is that of an accumulator,
// and of the products' operand A in registers.
template <int kParts>
__device__ __forceinline__ void stage_tile(uint32_t tile, const uint32_t (&packed)[kParts][4]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    store_matrices(part_address(tile, i), packed[i][0], packed[i][1], packed[i][2], packed[i][3]);
  }
}

// The same of kColumns columns of an accumulator, from register `first` on, times a factor.
template <int kColumns, int kCount>
__device__ __forceinline__ void stage_columns(uint32_t address, const float (&values)[kCount],
                                              int first, float factor = 1.0f) {
  uint32_t packed[kColumns / 16][4];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 2) {
    packed[i / 8][i / 2 % 4] =
        pack_bf16(values[first + i] * factor, values[first + i + 1] * factor);
  }
  stage_tile(address, packed);
}

// Of all its columns.
template <int kCount>
__device__ __forceinline__ void stage_rows(uint32_t address, const float (&values)[kCount],
                                           float factor) {
  stage_columns<2 * kCount>(address, values, 0, factor);
}

}  // namespace megatron_kanana::sm90
