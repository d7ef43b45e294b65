// The experts' gate and up projections in fp8, of gathered rows, and their activation, quantised.
#include <cuda_runtime.h>

#include "sm90_fp8_experts_launch.h"
#include "sm90_fp8_staged_rows.cuh"
#include "swiglu.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

// A tile's columns are 128 of the gate, and the same 128 of up: a thread has both. kKeepsFp8:
// whether the pre-activation is kept in 8 bits.
template <bool kKeepsFp8>
class Fp8UpForward {
 public:
  static constexpr int kColumns = 2 * kScaledColumns;
  static constexpr int kColumnStep = kScaledColumns;
  static constexpr int kLoadedStages = 0;
  static constexpr int kChunks = kKeepsFp8 ? 2 : kColumns / kChunk;  // of gate and up
  using Staged = StagedRows<kChunks + 1>;

  struct Arguments {
    StoredRows gate, up, activation;
    float* activation_scales;  // [rows, blocks]
    float* kept_scales;        // [rows, 2 * blocks], those of up behind those of the gate
    int blocks;
  };
  struct Shared {
    typename Staged::Buffers staged;
  };

  __device__ Fp8UpForward(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), staged_(shared.staged, 1 + warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile&, int, int) {}

  __device__ __forceinline__ void finish(float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    const int column = tile.column_tile * kColumnStep;
    const auto write = [&](int i, uint32_t chunk) {
      const int blocks = arguments_.blocks;
      if (i == kChunks) {
        stage_activation(chunk, sums, tile, first_row, valid_rows);
      } else if constexpr (kKeepsFp8) {
        float* scales = arguments_.kept_scales + int64_t(first_row) * 2 * blocks + i * blocks;
        stage_kept(chunk, sums, i * kColumns / 4, scales + tile.column_tile, 2 * blocks,
                   valid_rows);
      } else {
        stage_columns<kChunk>(chunk, sums, i * kChunk / 2);
      }
    };
    const auto store = [&](int i, const void* chunk) {
      if (i < kChunks) {
        const StoredRows& rows = i < kChunks / 2 ? arguments_.gate : arguments_.up;
        const int within = kKeepsFp8 ? column / 2 : column + i % (kChunks / 2) * kChunk;
        rows.store(chunk, within, first_row, valid_rows);
      } else {
        arguments_.activation.store(chunk, column / 2, first_row, valid_rows);
      }
    };
    staged_.store(write, store);
  }

  __device__ __forceinline__ void end() { staged_.end(); }

 private:
  // The last chunk: gate and up are staged, and the activation takes the gate's place.
  __device__ __forceinline__ void stage_activation(uint32_t chunk, float (&sums)[kColumns / 2],
                                                   const RowTile& tile, int first_row,
                                                   int valid_rows) {
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
#pragma unroll
    for (int i = 0; i < kColumns / 4; i += 2) {
      const float inverse = inverses[i / 2 % 2];
      store_pair(pair_address(chunk, i / 4, i / 2 % 2),
                 pack_e4m3(sums[i] * inverse, sums[i + 1] * inverse));
    }
  }

  const Arguments& arguments_;
  Staged staged_;
};

template <bool kGather, bool kKeepsFp8>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const Fp8Rows& hidden_states,
            const Fp8Weights& gate_up, const KeptPreActivation& kept, void* activation,
            float* activation_scales, void* stream) {
  using Epilogue = Fp8UpForward<kKeepsFp8>;
  using Matmul = Fp8RowMatmul<kGather, 3, Epilogue>;
  const int width = sizes.width, blocks = width / kScaleBlock;
  const int kept_width = kKeepsFp8 ? width / 2 : width;  // as bf16
  const auto kept_rows = [&](int first_column) {
    return open_rows(columns_from(kept.data, first_column), sizes.rows, kept_width, 2 * kept_width);
  };
  typename Matmul::Arguments arguments;
  arguments.b = weights_map(gate_up.data, sizes.experts, 2 * width, sizes.hidden_size / 2,
                            Epilogue::kColumnStep);
  set_rows<Matmul>(arguments, sizes, rows, hidden_states.data, sizes.hidden_size);
  arguments.column_tiles = blocks;
  arguments.second_half = width;
  arguments.epilogue = {.gate = kept_rows(0),
                        .up = kept_rows(kept_width),
                        .activation = open_rows(activation, sizes.rows, width / 2, width / 2),
                        .activation_scales = activation_scales,
                        .kept_scales = kept.scales,
                        .blocks = blocks};
  arguments.scales =
      scales_of(hidden_states.scales, gate_up.scales, 2 * width, sizes.hidden_size, false, blocks);
  launch_fp8_row_matmul<Matmul>(arguments, "fp8_experts_up_forward", stream);
}

}  // namespace
}  // namespace sm90

void fp8_experts_up_forward(const ExpertSizes& sizes, const ExpertRows& rows,
                            const Fp8Rows& hidden_states, const Fp8Weights& gate_up,
                            const KeptPreActivation& kept, void* activation,
                            float* activation_scales, void* stream) {
  if (sizes.rows == 0) return;
  sm90::enter_device();
  const bool keeps_fp8 = kept.scales != nullptr;
  const auto launch = sm90::are_gathered(rows)
                          ? (keeps_fp8 ? sm90::launch<true, true> : sm90::launch<true, false>)
                          : (keeps_fp8 ? sm90::launch<false, true> : sm90::launch<false, false>);
  launch(sizes, rows, hidden_states, gate_up, kept, activation, activation_scales, stream);
}

}  // namespace megatron_kanana
