// Rows as operands that are summed over rows: the tensor cores take 8 bits along the summed
// dimension alone, so the rows' columns have to lie one after the other.
//
// A tile is 64 rows of an expert, the columns one after the other, 64 bytes each, swizzled as the
// tensor cores take 64 bytes. A sum does not ask for an order: what is easy to write decides. Of
// rows 16q to 16q + 15, byte 2g is row g and byte 2g + 1 is row g + 8.
#pragma once

#include "fp8_experts.h"
#include "sm90_row_groups.cuh"

namespace megatron_kanana::sm90 {

constexpr int kColumnTileRows = kFp8ColumnTileRows;

// Where an expert's tiles begin. There are tiles between experts that nothing belongs to, so that
// nobody has to add up how many the experts before have.
__host__ __device__ __forceinline__ int first_column_tile(int first_row, int expert) {
  return first_row / kColumnTileRows + expert;
}

// Where rows 16q to 16q + 15 of a column lie in a tile, 16 bytes.
__device__ __forceinline__ uint32_t column_address(uint32_t tile, int column, int q) {
  return tile + column * kColumnTileRows + (q ^ (column / 2 % 4)) * 16;
}

}  // namespace megatron_kanana::sm90
