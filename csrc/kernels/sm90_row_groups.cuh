// Rows sorted by expert, dealt into tiles that each belong to one expert.
#pragma once

#include "sm90_tiles.cuh"

namespace megatron_kanana::sm90 {

// Rows offsets[e] to offsets[e + 1] are expert e's. Without offsets there is one expert, of all
// rows.
struct RowGroups {
  const int32_t* offsets;
  int experts;
  int rows;

  __device__ __forceinline__ int begin(int expert) const {
    return offsets == nullptr ? 0 : __ldg(offsets + expert);
  }
  __device__ __forceinline__ int end(int expert) const {
    return offsets == nullptr ? rows : __ldg(offsets + expert + 1);
  }
};

constexpr int kTileRows = 128;

// Number of the first tile of rows of each expert, and of all tiles at the end; by one warp.
__device__ inline void count_row_tiles(const RowGroups& groups, int* first_tile) {
  const int lane = threadIdx.x % kWarp;
  int sum = 0;
  for (int first = 0; first < groups.experts; first += kWarp) {
    const int expert = first + lane;
    int tiles = 0;
    if (expert < groups.experts) {
      tiles = (groups.end(expert) - groups.begin(expert) + kTileRows - 1) / kTileRows;
    }
    int through = tiles;  // of the experts up to this lane's
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(~0u, through, distance);
      if (lane >= distance) through += other;
    }
    if (expert < groups.experts) first_tile[expert] = sum + through - tiles;
    sum += __shfl_sync(~0u, through, kWarp - 1);
  }
  if (lane == 0) first_tile[groups.experts] = sum;
}

// A tile of an expert's rows and of the product's columns.
struct RowTile {
  int expert;
  int first_row;
  int end_row;  // of the expert
  int column_tile;
};

// The tiles of this block, in order: the tiles of columns of the same rows follow each other, so
// that blocks at work at the same time share rows and weights in the level-2 cache.
class RowTiles {
 public:
  __device__ RowTiles(const RowGroups& groups, const int* first_tile, int column_tiles)
      : groups_(groups), first_tile_(first_tile), column_tiles_(column_tiles) {}

  __device__ __forceinline__ bool next(RowTile& tile) {
    // The same in all threads of a warp, which the compiler has to be told.
    const int row_tile = __shfl_sync(~0u, tile_ / column_tiles_, 0);
    if (row_tile >= first_tile_[groups_.experts]) return false;
    while (row_tile >= first_tile_[expert_ + 1]) ++expert_;
    tile.expert = __shfl_sync(~0u, expert_, 0);
    tile.first_row =
        __shfl_sync(~0u, groups_.begin(expert_) + (row_tile - first_tile_[expert_]) * kTileRows, 0);
    tile.end_row = __shfl_sync(~0u, groups_.end(expert_), 0);
    tile.column_tile = __shfl_sync(~0u, tile_ % column_tiles_, 0);
    tile_ += gridDim.x;
    return true;
  }

 private:
  const RowGroups& groups_;
  const int* first_tile_;
  const int column_tiles_;
  int tile_ = blockIdx.x;
  int expert_ = 0;
};

}  // namespace megatron_kanana::sm90
