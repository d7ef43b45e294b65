// The experts' gate and up projections in fp8, of gathered rows, and their activation, quantised.
#include <cuda_runtime.h>

#include "sm90_fp8_experts_launch.h"
#include "sm90_fp8_staged_rows.cuh"
#include "swiglu.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

// A tile's columns are 128 of the gate, and the same 128 of up: a thread has both.
class Fp8UpForward {
 public:
  static constexpr int kColumns = 2 * kScaledColumns;
  static constexpr int kColumnStep = kScaledColumns;
  static constexpr int kLoadedStages = 0;

  struct Arguments {
    StoredRows gate, up, activation;
    float* activation_scales;  // [rows, blocks]
    int blocks;
  };
  struct Shared {
    uint8_t staged[2][kStagedBytes];
  };

  __device__ Fp8UpForward(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), staged_(shared.staged, 1 + warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile&, int, int) {}

  __device__ __forceinline__ void finish(float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    const int column = tile.column_tile * kColumnStep;
    store_bf16<0>(sums, arguments_.gate, column, first_row, valid_rows);
    store_bf16<32>(sums, arguments_.gate, column + kChunk, first_row, valid_rows);
    store_bf16<64>(sums, arguments_.up, column, first_row, valid_rows);
    store_bf16<96>(sums, arguments_.up, column + kChunk, first_row, valid_rows);
    float largest[2] = {0.0f, 0.0f}, inverses[2];
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      sums[i] = swiglu(sums[i], sums[kColumns / 4 + i]);
      largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(sums[i]));
    }
    find_scales(
        largest, inverses,
        arguments_.activation_scales + int64_t(first_row) * arguments_.blocks + tile.column_tile,
        arguments_.blocks, valid_rows);
    const auto write = [&](uint32_t buffer) {
#pragma unroll
      for (int i = 0; i < kColumns / 4; i += 2) {
        const float inverse = inverses[i / 2 % 2];
        store_pair(pair_address(buffer, i / 4, i / 2 % 2),
                   pack_e4m3(sums[i] * inverse, sums[i + 1] * inverse));
      }
    };
    staged_.store(write, arguments_.activation, column / 2, first_row, valid_rows);
  }

  __device__ __forceinline__ void end() { staged_.end(); }

 private:
  template <int kFirst>
  __device__ __forceinline__ void store_bf16(const float (&sums)[kColumns / 2],
                                             const StoredRows& rows, int column, int first_row,
                                             int valid_rows) {
    uint32_t packed[4][4];
    pack_columns<kFirst>(sums, packed);
    staged_.store(packed, rows, column, first_row, valid_rows);
  }

  const Arguments& arguments_;
  StagedRows staged_;
};

}  // namespace
}  // namespace sm90

void fp8_experts_up_forward(const ExpertSizes& sizes, const ExpertRows& rows,
                            const Fp8Rows& hidden_states, const Fp8Weights& gate_up,
                            void* pre_activation, void* activation, float* activation_scales,
                            void* stream) {
  using namespace sm90;
  using Matmul = Fp8RowMatmul<true, 4, Fp8UpForward>;
  if (sizes.rows == 0) return;
  enter_device();
  const int width = sizes.width, blocks = width / kScaleBlock;
  Matmul::Arguments arguments;
  arguments.b = weights_map(gate_up.data, sizes.experts, 2 * width, sizes.hidden_size / 2,
                            Fp8UpForward::kColumnStep);
  arguments.gathered = gathered_fp8_rows(sizes, rows, hidden_states.data);
  arguments.groups = row_groups(sizes, rows);
  arguments.depth = sizes.hidden_size / 2;
  arguments.column_tiles = blocks;
  arguments.second_half = width;
  arguments.epilogue = {
      .gate = open_rows(pre_activation, sizes.rows, width, 2 * width),
      .up = open_rows(columns_from(pre_activation, width), sizes.rows, width, 2 * width),
      .activation = open_rows(activation, sizes.rows, width / 2, width / 2),
      .activation_scales = activation_scales,
      .blocks = blocks};
  arguments.scales =
      scales_of(hidden_states.scales, gate_up.scales, 2 * width, sizes.hidden_size, false, blocks);
  launch_fp8_row_matmul<Matmul>(arguments, "fp8_experts_up_forward", stream);
}

}  // namespace megatron_kanana
