// What the forward and the backward of attention share: tiles in shared memory, rings of stages.
#pragma once

#include "sm90_attention_mask.cuh"
#include "sm90_wgmma.cuh"

namespace megatron_kanana::sm90 {

constexpr int kChunk = 64;  // columns of a swizzled chunk of 128 bytes
constexpr float kLog2E = 1.44269504f;

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

// Work of `rows` tiles for each head, in an order that keeps what is read in the level-2 cache and
// ends evenly: heads in groups, the last of them larger; within a group row 0 of each head first,
// then row 1.
struct HeadGroups {
  int rows;
  int heads;
  int heads_of_a_group;
  int last_group;  // the first head of it

  struct Place {
    int row;
    int head;
  };

  __device__ __forceinline__ Place of(int tile) const {
    const int head = tile / rows;
    int first = last_group, group = heads - last_group;
    if (head < last_group) {
      first = head / heads_of_a_group * heads_of_a_group;
      group = heads_of_a_group;
    }
    const int within = tile - first * rows;
    return {within / group, first + within % group};
  }
};

// Scores of two rows of a thread, from column `first` on, outside what the rows see become minus
// infinity.
template <int kCount>
__device__ __forceinline__ void hide(float (&scores)[kCount], int first, Run upper, Run lower) {
  const int column = first + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int position = column + i / 4 * 8 + i % 2;
    const Run& run = i / 2 % 2 == 0 ? upper : lower;
    if (position < run.begin || position >= run.end) scores[i] = -INFINITY;
  }
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

// The same of an accumulator, times a factor.
template <int kCount>
__device__ __forceinline__ void stage_rows(uint32_t address, const float (&values)[kCount],
                                           float factor) {
  uint32_t packed[kCount / 8][4];
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    packed[i / 8][i / 2 % 4] = pack_bf16(values[i] * factor, values[i + 1] * factor);
  }
  stage_tile(address, packed);
}

}  // namespace megatron_kanana::sm90
