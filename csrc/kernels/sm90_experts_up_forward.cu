// The experts' gate and up projections and their activation, of gathered rows.
#include <cuda_runtime.h>

#include "sm90_experts_launch.h"
#include "swiglu.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

// A tile's columns are 128 of the gate, and the same 128 of up: a thread has both.
class UpForward {
 public:
  static constexpr int kColumns = 256;
  static constexpr int kColumnStep = 128;
  static constexpr int kLoadedStages = 0;
  static constexpr int kHalf = kColumns / 4;  // registers of the gate, and of up
  using Staged = StagedRows<3>;

  struct Arguments {
    StoredRows gate, up, activation;
  };
  struct Shared {
    Staged::Buffers staged;
  };

  __device__ UpForward(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), staged_(shared.staged, 1 + warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile&, int, int) {}

  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    const int column = tile.column_tile * kColumnStep;
#pragma unroll
    for (int first = 0; first < kHalf; first += kChunk / 2) {
      const auto write = [&](int i, uint32_t chunk) {
        if (i < 2) {
          stage_columns<kChunk>(chunk, sums, i * kHalf + first);
        } else {
          stage_activation(chunk, sums, first);
        }
      };
      const auto store = [&](int i, const void* chunk) {
        const StoredRows* const rows[] = {&arguments_.gate, &arguments_.up, &arguments_.activation};
        rows[i]->store(chunk, column + 2 * first, first_row, valid_rows);
      };
      staged_.store(write, store);
    }
  }

  __device__ __forceinline__ void end() { staged_.end(); }

 private:
  static __device__ __forceinline__ void stage_activation(uint32_t chunk,
                                                          const float (&sums)[kColumns / 2],
                                                          int first) {
    uint32_t packed[4][4];
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int gate = first + i, up = kHalf + gate;
      packed[i / 8][i / 2 % 4] =
          pack_bf16(swiglu(sums[gate], sums[up]), swiglu(sums[gate + 1], sums[up + 1]));
    }
    stage_tile(chunk, packed);
  }

  const Arguments& arguments_;
  Staged staged_;
};

}  // namespace
}  // namespace sm90

void experts_up_forward(const ExpertSizes& sizes, const ExpertRows& rows, const void* hidden_states,
                        const void* gate_up, void* pre_activation, void* activation, void* stream) {
  using namespace sm90;
  using Matmul = RowMatmul<true, false, 3, UpForward>;
  if (sizes.rows == 0) return;
  enter_device();
  const int width = sizes.width;
  launch_row_matmul<Matmul>(
      {
          .a = {},
          .b = weights_map(gate_up, sizes.experts, 2 * width, sizes.hidden_size,
                           UpForward::kColumnStep),
          .gathered = gathered_rows(sizes, rows, hidden_states),
          .groups = row_groups(sizes, rows),
          .depth = sizes.hidden_size,
          .column_tiles = (width + UpForward::kColumnStep - 1) / UpForward::kColumnStep,
          .second_half = width,
          .epilogue = {.gate = open_rows(pre_activation, sizes.rows, width, 2 * width),
                       .up = open_rows(columns_from(pre_activation, width), sizes.rows, width,
                                       2 * width),
                       .activation = open_rows(activation, sizes.rows, width, width)},
      },
      "experts_up_forward", stream);
}

}  // namespace megatron_kanana
