// Tiles of a gradient of the experts' weights in fp8, and the rows that each is a sum over.
#pragma once

#include "sm90_fp8_column_tiles.cuh"
#include "sm90_row_matmul.cuh"

namespace megatron_kanana::sm90 {

constexpr int kStageRows = 128;
constexpr int kTokenColumns = 128;
constexpr int kRowColumns = 256;
constexpr int kHalves = kStageRows / kColumnTileRows;

struct WeightGradientArguments {
  const uint8_t* columns;  // [tiles, width, 64]
  const float* scales;     // [tiles, width / 128]
  int width;               // of the rows in order
  const uint8_t* tokens;   // [tokens, token_width], which are gathered
  int token_width;
  GatheredRows token_of_row;
  CUtensorMap ordered_tokens;  // the same where they are rows in order, as bf16 of half the width
  RowGroups groups;
  CUtensorMap gradient;  // fp32 [experts, rows, columns]
  bool overwrites;       // the gradient, of which nothing is to be kept
  int row_parts;         // that an expert's rows are dealt to, each for a block of its own
};

struct WeightGradientTile {
  static constexpr int kStages = 3;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kHalfBytes = kRowColumns * kColumnTileRows;
  struct Stage {
    uint8_t tokens[kStageRows * kTokenColumns];  // [row][column], swizzled by 128 bytes
    uint8_t rows[kHalves][kHalfBytes];           // [column][row], swizzled by 64 bytes
  };
  struct Shared {
    Stage stages[kStages];
    float sums[2][2][64 * 64];  // a warpgroup's on their way to memory
    uint64_t full[kStages], empty[kStages];
  };
};

// A tile of a weight's gradient.
struct Work {
  int expert, token_column, row_column;
  int first_row, end_row;
  int column_tile;

  __device__ static Work of(const WeightGradientArguments& arguments, int tile) {
    const int row_tiles = (arguments.width + kRowColumns - 1) / kRowColumns;
    const int token_tiles = arguments.token_width / kTokenColumns;
    const int part = tile % arguments.row_parts;
    tile /= arguments.row_parts;
    Work work;
    work.expert = tile / (row_tiles * token_tiles);
    const int within = tile % (row_tiles * token_tiles);
    work.row_column = within % row_tiles * kRowColumns;
    work.token_column = within / row_tiles * kTokenColumns;
    const int begin = __shfl_sync(~0u, arguments.groups.begin(work.expert), 0);
    const int end = __shfl_sync(~0u, arguments.groups.end(work.expert), 0);
    const int stages = (end - begin + kStageRows - 1) / kStageRows;
    const int rows = (stages + arguments.row_parts - 1) / arguments.row_parts * kStageRows;
    work.first_row = begin + part * rows;
    work.end_row = min(work.first_row + rows, end);
    work.column_tile = first_column_tile(begin, work.expert) + part * rows / kColumnTileRows;
    return work;
  }

  static int count(const WeightGradientArguments& arguments) {
    const int row_tiles = (arguments.width + kRowColumns - 1) / kRowColumns;
    const int token_tiles = arguments.token_width / kTokenColumns;
    return arguments.groups.experts * row_tiles * token_tiles * arguments.row_parts;
  }

  __device__ int steps() const { return max(0, end_row - first_row + kStageRows - 1) / kStageRows; }
};

// The steps of this block's tiles, one after the other.
class Steps {
 public:
  Work work;
  int step = -1;
  bool there = true;

  __device__ Steps(const WeightGradientArguments& arguments, int tiles)
      : arguments_(arguments), tiles_(tiles) {
    find();
  }

  __device__ __forceinline__ void next() {
    if (++step == work.steps()) {
      tile_ += gridDim.x;
      find();
    }
  }
  __device__ __forceinline__ int first_row() const { return work.first_row + step * kStageRows; }

 private:
  __device__ __forceinline__ void find() {
    step = 0;
    for (; tile_ < tiles_; tile_ += gridDim.x) {
      work = Work::of(arguments_, tile_);
      if (work.steps() > 0) return;
    }
    there = false;
  }

  const WeightGradientArguments& arguments_;
  const int tiles_;
  int tile_ = blockIdx.x;
};

}  // namespace megatron_kanana::sm90
