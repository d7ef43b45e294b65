// Backward through the experts' down projection in fp8 and their activation, of gathered rows of
// grad_out; the gradient of the pre-activation comes quantised as well.
#include <cuda_runtime.h>

#include <type_traits>

#include "sm90_experts_down_backward.cuh"
#include "sm90_fp8_experts_launch.h"
#include "sm90_fp8_staged_rows.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

// Gradients of gate and up of 128 columns, each row's with a scale of its own.
class QuantizedGradients {
 public:
  struct Arguments {
    StoredRows gate, up;
    float* scales;  // [rows, 2 * blocks], those of up behind those of gate
    int blocks;
  };
  struct Shared {
    uint8_t staged[2][kStagedBytes];
  };

  __device__ QuantizedGradients(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), shared_(shared), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void note(int half, float2 gate, float2 up) {
    largest_gate_[half] = fmaxf(largest_gate_[half], fmaxf(fabsf(gate.x), fabsf(gate.y)));
    largest_up_[half] = fmaxf(largest_up_[half], fmaxf(fabsf(up.x), fabsf(up.y)));
  }

  // The tiles lie in shared memory, on their way to memory. Those of the last tile have left, for
  // the warpgroup has freed its stages since.
  template <int kPieces>
  __device__ __forceinline__ void finish(uint8_t* const (&places)[kPieces][2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    static_assert(kPieces * kChunk == kScaleBlock);
    const bool leader = threadIdx.x % kWarpgroup == 0;
    const int stride = 2 * arguments_.blocks;
    float* scales = arguments_.scales + int64_t(first_row) * stride + tile.column_tile;
    float inverses[2];
    find_scales(largest_gate_, inverses, scales, stride, valid_rows);
    quantize<0>(places, inverses);
    find_scales(largest_up_, inverses, scales + arguments_.blocks, stride, valid_rows);
    quantize<1>(places, inverses);
    fence_shared_for_async();
    named_sync(1 + warpgroup_, kWarpgroup);
    if (leader) {
      const int column = tile.column_tile * kScaleBlock / 2;
      arguments_.gate.store(shared_.staged[0], column, first_row, valid_rows);
      arguments_.up.store(shared_.staged[1], column, first_row, valid_rows);
      bulk_commit();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) largest_gate_[half] = largest_up_[half] = 0.0f;
  }

 private:
  template <int kWhich, int kPieces>
  __device__ __forceinline__ void quantize(uint8_t* const (&places)[kPieces][2],
                                           const float (&inverses)[2]) {
    const uint32_t staged = shared_address(shared_.staged[kWhich]);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint32_t tile = shared_address(places[piece][kWhich]);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        uint32_t values[4];
        load_matrices(tile + part_address(0, part), values[0], values[1], values[2], values[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i % 2, eight = piece * 8 + part * 2 + i / 2;
          const float2 pair = unpack_bf16(values[i]);
          store_pair(pair_address(staged, eight, half),
                     pack_e4m3(pair.x * inverses[half], pair.y * inverses[half]));
        }
      }
    }
  }

  const Arguments& arguments_;
  Shared& shared_;
  const int warpgroup_;
  float largest_gate_[2] = {0.0f, 0.0f}, largest_up_[2] = {0.0f, 0.0f};
};

// A pre-activation in 8 bits: a stage holds all 128 columns of a tile, which a thread takes into
// registers.
class Fp8PreActivation {
 public:
  struct Arguments {
    CUtensorMap gate, up;
    const float* scales;  // [rows, 2 * blocks], those of up behind those of the gate
    int blocks;
  };
  static constexpr int kLoadedColumns = kScaleBlock;

  __device__ __forceinline__ void begin(const Arguments& arguments, int block, int first_row,
                                        int valid_rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + min(accumulator_row() + 8 * half, valid_rows - 1);
      const float* scales = arguments.scales + int64_t(row) * 2 * arguments.blocks + block;
      gate_scales_[half] = __ldg(scales);
      up_scales_[half] = __ldg(scales + arguments.blocks);
    }
  }

  __device__ __forceinline__ void take(uint8_t* const (&places)[2], int named_barrier) {
    gate_.load(shared_address(places[0]));
    up_.load(shared_address(places[1]));
    named_sync(named_barrier, kWarpgroup);
  }

  __device__ __forceinline__ Bf16PreActivation::Pairs read(uint32_t, uint32_t, int piece,
                                                           int part) const {
    Bf16PreActivation::Pairs pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 gate = gate_.at(piece * 4 + part, i / 2, i % 2);
      const float2 up = up_.at(piece * 4 + part, i / 2, i % 2);
      pairs.gate[i] = {gate.x * gate_scales_[i % 2], gate.y * gate_scales_[i % 2]};
      pairs.up[i] = {up.x * up_scales_[i % 2], up.y * up_scales_[i % 2]};
    }
    return pairs;
  }

 private:
  KeptRows gate_, up_;
  float gate_scales_[2], up_scales_[2];
};

template <bool kKeptFp8>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const Fp8Rows& grad_out,
            const Fp8Weights& down, const KeptPreActivation& kept, void* grad_pre_activation,
            void* quantized_grad, float* grad_scales, void* weighted_activation,
            float* grad_weight_parts, void* stream) {
  using PreActivation = std::conditional_t<kKeptFp8, Fp8PreActivation, Bf16PreActivation>;
  using Epilogue = DownBackward<kScaleBlock, QuantizedGradients, PreActivation>;
  using Matmul = Fp8RowMatmul<true, 5, Epilogue>;
  const int width = sizes.width, blocks = width / kScaleBlock;
  const int kept_width = kKeptFp8 ? width / 2 : width;  // as bf16
  const auto kept_map = [&](int first_column) {
    return ordered_rows_map(columns_from(kept.data, first_column), sizes.rows, kept_width,
                            2 * kept_width, kStoredRows);
  };
  const auto half_rows = [&](int first_column) {
    return open_rows(columns_from(grad_pre_activation, first_column), sizes.rows, width, 2 * width);
  };
  const auto quantized_rows = [&](int first_column) {
    return open_rows(columns_from(quantized_grad, first_column / 2), sizes.rows, width / 2, width);
  };
  typename Matmul::Arguments arguments;
  arguments.b =
      weights_map(down.data, sizes.experts, width, sizes.hidden_size / 2, Epilogue::kColumns / 2);
  arguments.gathered = gathered_fp8_rows(sizes, rows, grad_out.data);
  arguments.groups = row_groups(sizes, rows);
  arguments.depth = sizes.hidden_size / 2;
  arguments.column_tiles = blocks;
  arguments.second_half = Epilogue::kColumns / 2;
  arguments.epilogue = {.pre_activation = {.gate = kept_map(0), .up = kept_map(kept_width)},
                        .grad_gate = half_rows(0),
                        .grad_up = half_rows(width),
                        .activation = open_rows(weighted_activation, sizes.rows, width, width),
                        .weights = rows.weights,
                        .slot_of_row = rows.slot_of_row,
                        .grad_weight_parts = grad_weight_parts,
                        .column_tiles = blocks,
                        .quantization = {.gate = quantized_rows(0),
                                         .up = quantized_rows(width),
                                         .scales = grad_scales,
                                         .blocks = blocks}};
  if constexpr (kKeptFp8) {
    arguments.epilogue.pre_activation.scales = kept.scales;
    arguments.epilogue.pre_activation.blocks = blocks;
  }
  arguments.scales = scales_of(grad_out.scales, down.scales, sizes.hidden_size, width, true);
  launch_fp8_row_matmul<Matmul>(arguments, "fp8_experts_down_backward", stream);
}

}  // namespace
}  // namespace sm90

int fp8_experts_grad_weight_parts(const ExpertSizes& sizes) { return sizes.width / kScaleBlock; }

void fp8_experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                               const Fp8Rows& grad_out, const Fp8Weights& down,
                               const KeptPreActivation& kept, void* grad_pre_activation,
                               void* quantized_grad, float* grad_scales, void* weighted_activation,
                               float* grad_weight_parts, void* stream) {
  if (sizes.rows == 0) return;
  sm90::enter_device();
  const auto launch = kept.scales == nullptr ? sm90::launch<false> : sm90::launch<true>;
  launch(sizes, rows, grad_out, down, kept, grad_pre_activation, quantized_grad, grad_scales,
         weighted_activation, grad_weight_parts, stream);
}

}  // namespace megatron_kanana
