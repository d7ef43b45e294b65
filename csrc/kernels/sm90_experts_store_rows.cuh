// What is made of a product of which nothing but the result is needed: it is stored in bf16.
#pragma once

#include "sm90_staged_rows.cuh"

namespace megatron_kanana::sm90 {

class StoreRows {
 public:
  static constexpr int kColumns = 256;
  static constexpr int kColumnStep = kColumns;

  static constexpr int kLoadedStages = 0;

  struct Arguments {
    StoredRows out;
  };
  struct Shared {
    uint8_t staged[2][kStagedBytes];
  };

  __device__ StoreRows(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), staged_(shared.staged, 1 + warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile&, int, int) {}

  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    const int column = tile.column_tile * kColumns;
    finish_chunk<0>(sums, column, first_row, valid_rows);
    finish_chunk<32>(sums, column, first_row, valid_rows);
    finish_chunk<64>(sums, column, first_row, valid_rows);
    finish_chunk<96>(sums, column, first_row, valid_rows);
  }

  __device__ __forceinline__ void end() { staged_.end(); }

 private:
  template <int kFirst>
  __device__ __forceinline__ void finish_chunk(const float (&sums)[kColumns / 2], int column,
                                               int first_row, int valid_rows) {
    uint32_t packed[4][4];
    pack_columns<kFirst>(sums, packed);
    staged_.store(packed, arguments_.out, column + 2 * kFirst, first_row, valid_rows);
  }

  const Arguments& arguments_;
  StagedRows staged_;
};

}  // namespace megatron_kanana::sm90
