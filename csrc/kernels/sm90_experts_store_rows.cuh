// What is made of a product of which nothing but the result is needed: it is stored in bf16.
#pragma once

#include "sm90_staged_rows.cuh"

namespace megatron_kanana::sm90 {

class StoreRows {
 public:
  static constexpr int kColumns = 256;
  static constexpr int kColumnStep = kColumns;
  static constexpr int kLoadedStages = 0;
  using Staged = StagedRows<kColumns / kChunk>;

  struct Arguments {
    StoredRows out;
  };
  struct Shared {
    Staged::Buffers staged;
  };

  __device__ StoreRows(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), staged_(shared.staged, 1 + warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile&, int, int) {}

  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    const int column = tile.column_tile * kColumns;
    staged_.store(
        [&](int i, uint32_t chunk) { stage_columns<kChunk>(chunk, sums, i * kChunk / 2); },
        [&](int i, const void* chunk) {
          arguments_.out.store(chunk, column + i * kChunk, first_row, valid_rows);
        });
  }

  __device__ __forceinline__ void end() { staged_.end(); }

 private:
  const Arguments& arguments_;
  Staged staged_;
};

}  // namespace megatron_kanana::sm90
