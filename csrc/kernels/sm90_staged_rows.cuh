// Rows that a warpgroup writes: staged in shared memory, 64 rows of 64 columns at a time, and
// stored by the bulk copy engine. Rows of a tile that are not the expert's are left out.
#pragma once

#include "sm90_row_groups.cuh"

namespace megatron_kanana::sm90 {

constexpr int kStoredRows = 64;
constexpr int kStagedBytes = kStoredRows * kChunk * 2;

// Up to kRows rows of a bf16 tensor [rows, width], from any row on, in boxes of 64 columns: a
// tensor of three dimensions [starts, kRows, width] of which neighbouring starts overlap. Its
// address is kRows rows before the rows' own; a box then ends with the second dimension, which is
// what cuts its rows off. The copy engine touches that address, where nothing need be, if all of a
// box lies outside, so boxes beyond the last column are not asked for.
template <int kRows>
struct OpenRows {
  CUtensorMap map;
  int width;

  __device__ __forceinline__ void store(const void* staged, int column, int first_row,
                                        int valid_rows) const {
    if (column >= width) return;
    store_box(&map, staged, column, kRows - valid_rows, first_row + valid_rows);
  }
  // Rows cut off are zero. Only for columns inside.
  __device__ __forceinline__ void load(void* staged, uint64_t* barrier, int column, int first_row,
                                       int valid_rows) const {
    load_box(staged, &map, barrier, column, kRows - valid_rows, first_row + valid_rows);
  }
};

using StoredRows = OpenRows<kStoredRows>;

// Two buffers, one of which is written while the other is read.
class StagedRows {
 public:
  __device__ StagedRows(uint8_t (&buffers)[2][kStagedBytes], int named_barrier)
      : buffers_(buffers), named_barrier_(named_barrier) {}

  // Writes an accumulator of 64 columns as bf16 and starts its store.
  __device__ __forceinline__ void store(const uint32_t (&packed)[4][4], const StoredRows& rows,
                                        int column, int first_row, int valid_rows) {
    store([&](uint32_t tile) { stage_tile(tile, packed); }, rows, column, first_row, valid_rows);
  }

  // The same of what `write` puts at an address.
  template <class Write>
  __device__ __forceinline__ void store(const Write& write, const StoredRows& rows, int column,
                                        int first_row, int valid_rows) {
    const bool leader = threadIdx.x % kWarpgroup == 0;
    uint8_t* buffer = buffers_[turn_];
    if (leader) bulk_wait_read<1>();
    named_sync(named_barrier_, kWarpgroup);
    write(shared_address(buffer));
    fence_shared_for_async();
    named_sync(named_barrier_, kWarpgroup);
    if (leader) {
      rows.store(buffer, column, first_row, valid_rows);
      bulk_commit();
    }
    turn_ ^= 1;
  }

  // Waits for all of them.
  __device__ __forceinline__ void end() {
    if (threadIdx.x % kWarpgroup == 0) bulk_wait();
  }

 private:
  uint8_t (&buffers_)[2][kStagedBytes];
  const int named_barrier_;
  int turn_ = 0;
};

// 64 columns of an accumulator, from register `kFirst` on, as bf16.
template <int kFirst, int kCount>
__device__ __forceinline__ void pack_columns(const float (&sums)[kCount],
                                             uint32_t (&packed)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    packed[i / 4][i % 4] = pack_bf16(sums[kFirst + 2 * i], sums[kFirst + 2 * i + 1]);
  }
}

}  // namespace megatron_kanana::sm90
