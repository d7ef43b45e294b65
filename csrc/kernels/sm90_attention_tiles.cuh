// What the forward and the backward of attention share: the order of work, and hidden scores.
#pragma once

#include "sm90_attention_mask.cuh"
#include "sm90_tiles.cuh"

namespace megatron_kanana::sm90 {

constexpr float kLog2E = 1.44269504f;

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

}  // namespace megatron_kanana::sm90
