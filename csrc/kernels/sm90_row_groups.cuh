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
  __device__ RowTiles(const RowGroups& groups, int column_tiles)
      : groups_(groups), column_tiles_(column_tiles), end_row_(groups.begin(0)) {
    enter_expert(0);
  }

  __device__ __forceinline__ bool next(RowTile& tile) {
    // The same in all threads of a warp, which the compiler has to be told.
    const int row_tile = __shfl_sync(~0u, tile_ / column_tiles_, 0);
    while (row_tile >= end_tile_) {
      if (expert_ + 1 == groups_.experts) return false;
      enter_expert(expert_ + 1);
    }
    tile.expert = expert_;
    tile.first_row = first_row_ + (row_tile - first_tile_) * kTileRows;
    tile.end_row = end_row_;
    tile.column_tile = __shfl_sync(~0u, tile_ % column_tiles_, 0);
    tile_ += gridDim.x;
    return true;
  }

 private:
  __device__ __forceinline__ void enter_expert(int expert) {
    expert_ = expert;
    first_tile_ = end_tile_;
    first_row_ = end_row_;
    end_row_ = __shfl_sync(~0u, groups_.end(expert), 0);
    end_tile_ = first_tile_ + (end_row_ - first_row_ + kTileRows - 1) / kTileRows;
  }

  const RowGroups& groups_;
  const int column_tiles_;
  int tile_ = blockIdx.x;
  int expert_, first_row_, end_row_;
  int first_tile_, end_tile_ = 0;  // those before the expert's first one, and its last one
};

}  // namespace megatron_kanana::sm90
