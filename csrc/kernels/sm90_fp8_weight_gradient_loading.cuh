// What a gradient of the experts' weights in fp8 is a sum over, brought to shared memory by one
// warpgroup.
#pragma once

#include "sm90_fp8_weight_gradient_tiles.cuh"

namespace megatron_kanana::sm90 {

// By a warpgroup.
__device__ __forceinline__ void clear(uint8_t (&half)[WeightGradientTile::kHalfBytes]) {
  for (int i = threadIdx.x % kWarpgroup * 16; i < WeightGradientTile::kHalfBytes;
       i += kWarpgroup * 16) {
    *reinterpret_cast<uint4*>(half + i) = {0, 0, 0, 0};
  }
  fence_shared_for_async();
}

// By a warpgroup: a warp copies 32 of a stage's 128 rows, eight threads the 128 bytes of a row.
// `token`: of the row of this thread's number.
__device__ __forceinline__ void gather_tokens(const WeightGradientArguments& arguments,
                                              WeightGradientTile::Stage& stage, int token_column,
                                              int token) {
  constexpr int kPasses = kWarp / 4;
  const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp;
  const int part = lane % 8, row_of_lane = thread / kWarp * kWarp + lane / 8;
  const uint8_t* column = arguments.tokens + token_column + part * 16;
  const uint32_t to = shared_address(stage.tokens);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = row_of_lane + 4 * pass;
    const int64_t from = __shfl_sync(~0u, token, 4 * pass + lane / 8);
    copy_16_bytes(to + row * 128 + (part ^ (row % 8)) * 16, column + from * arguments.token_width);
  }
}

// By a warpgroup.
template <bool kGather>
__device__ void load_rows(const WeightGradientArguments& arguments,
                          WeightGradientTile::Shared& shared, int tiles) {
  const int thread = threadIdx.x % kWarpgroup;
  const GatheredRows& rows = arguments.token_of_row;
  Steps steps(arguments, tiles);
  const auto slot_of_thread = [&] {
    if (!kGather || !steps.there) return 0;
    return rows.slot(min(steps.first_row() + thread, steps.work.end_row - 1));
  };
  int slot = slot_of_thread();
  for (Ring<WeightGradientTile::kStages> ring; steps.there; ring.advance()) {
    const Work work = steps.work;
    const int tile = work.column_tile + steps.step * kHalves;
    const int halves = steps.first_row() + kColumnTileRows < work.end_row ? kHalves : 1;
    const int token = kGather ? rows.token(slot) : 0, first_row = steps.first_row();
    steps.next();
    slot = slot_of_thread();  // of the next step, while this one waits for its stage
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    uint64_t* full = &shared.full[ring.stage];
    auto& stage = shared.stages[ring.stage];
    if (thread == 0) {
      const int columns = min(kRowColumns, arguments.width - work.row_column);
      const int of_tokens = kGather ? 0 : sizeof(stage.tokens);
      barrier_expect(full, halves * columns * kColumnTileRows + of_tokens);
      if constexpr (!kGather) {
        load_box(stage.tokens, &arguments.ordered_tokens, full, work.token_column / 2, first_row,
                 0);
      }
      for (int half = 0; half < halves; ++half) {
        const int64_t column = int64_t(tile + half) * arguments.width + work.row_column;
        load_bytes(stage.rows[half], arguments.columns + column * kColumnTileRows,
                   columns * kColumnTileRows, full);
      }
    }
    __syncwarp();
    if (halves == 1) clear(stage.rows[1]);  // rows that are not the expert's come to nothing
    if constexpr (kGather) {
      gather_tokens(arguments, stage, work.token_column, token);
      barrier_arrive_after_copies(full);
    } else {
      barrier_arrive(full);
    }
  }
}

}  // namespace megatron_kanana::sm90
