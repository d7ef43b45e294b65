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

// Chunks of a warpgroup's tile, kChunks at a time: with many, its warps wait for each other less
// often.
template <int kChunks>
class StagedRows {
 public:
  using Buffers = uint8_t[kChunks][kStagedBytes];

  __device__ StagedRows(Buffers& buffers, int named_barrier)
      : buffers_(buffers), named_barrier_(named_barrier) {}

  // `write(i, address)` puts chunk i at an address, `store(i, chunk)` starts its way to memory.
  template <class Write, class Store>
  __device__ __forceinline__ void store(const Write& write, const Store& store) {
    const bool leader = threadIdx.x % kWarpgroup == 0;
    if (leader) bulk_wait_read();
    named_sync(named_barrier_, kWarpgroup);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) write(i, shared_address(buffers_[i]));
    fence_shared_for_async();
    named_sync(named_barrier_, kWarpgroup);
    if (leader) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) store(i, buffers_[i]);
      bulk_commit();
    }
  }

  // Waits for all of them.
  __device__ __forceinline__ void end() {
    if (threadIdx.x % kWarpgroup == 0) bulk_wait();
  }

 private:
  Buffers& buffers_;
  const int named_barrier_;
};

}  // namespace megatron_kanana::sm90
