// Backward through the experts' down projection in fp8 and their activation, of gathered rows of
// grad_out; the gradient of the pre-activation comes quantised as well.
#include <cuda_runtime.h>

#include <type_traits>

#include "sm90_fp8_experts_launch.h"
#include "sm90_fp8_gradient_columns.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

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

template <class Quantization, bool kKeptFp8>
using Epilogue = DownBackward<kScaleBlock, Quantization,
                              std::conditional_t<kKeptFp8, Fp8PreActivation, Bf16PreActivation>>;

struct Operands {
  const ExpertSizes& sizes;
  const ExpertRows& rows;
  const Fp8Rows& grad_out;
  const Fp8Weights& down;
  const KeptPreActivation& kept;
};

QuantizedGradients::Arguments gradient_rows(const ExpertSizes& sizes, void* data, float* scales) {
  const auto half = [&](int first_column) {
    return open_rows(columns_from(data, first_column / 2), sizes.rows, sizes.width / 2,
                     sizes.width);
  };
  return {half(0), half(sizes.width), scales, sizes.width / kScaleBlock};
}

// `epilogue`: but for what it shares with all others.
template <bool kGather, class Quantization, bool kKeptFp8>
void launch(const Operands& operands,
            const typename Epilogue<Quantization, kKeptFp8>::Arguments& epilogue,
            float* grad_weight_parts, void* stream) {
  using Matmul = Fp8RowMatmul<kGather, 5, Epilogue<Quantization, kKeptFp8>>;
  const auto& [sizes, rows, grad_out, down, kept] = operands;
  const int width = sizes.width, blocks = width / kScaleBlock;
  const int kept_width = kKeptFp8 ? width / 2 : width;  // as bf16
  const auto kept_map = [&](int first_column) {
    return ordered_rows_map(columns_from(kept.data, first_column), sizes.rows, kept_width,
                            2 * kept_width, kStoredRows);
  };
  typename Matmul::Arguments arguments;
  arguments.b =
      weights_map(down.data, sizes.experts, width, sizes.hidden_size / 2, Matmul::kColumns / 2);
  set_rows<Matmul>(arguments, sizes, rows, grad_out.data, sizes.hidden_size);
  arguments.column_tiles = blocks;
  arguments.second_half = Matmul::kColumns / 2;
  arguments.epilogue = epilogue;
  arguments.epilogue.pre_activation.gate = kept_map(0);
  arguments.epilogue.pre_activation.up = kept_map(kept_width);
  if constexpr (kKeptFp8) {
    arguments.epilogue.pre_activation.scales = kept.scales;
    arguments.epilogue.pre_activation.blocks = blocks;
  }
  arguments.epilogue.weights = rows.weights;
  arguments.epilogue.slot_of_row = rows.slot_of_row;
  arguments.epilogue.grad_weight_parts = grad_weight_parts;
  arguments.epilogue.column_tiles = blocks;
  arguments.scales = scales_of(grad_out.scales, down.scales, sizes.hidden_size, width, true);
  launch_fp8_row_matmul<Matmul>(arguments, "fp8_experts_down_backward", stream);
}

template <bool kKeptFp8>
void launch_beside_bf16(const Operands& operands, void* grad_pre_activation, void* quantized_grad,
                        float* grad_scales, void* weighted_activation, float* grad_weight_parts,
                        void* stream) {
  const ExpertSizes& sizes = operands.sizes;
  const int width = sizes.width;
  const auto half = [&](int first_column) {
    return open_rows(columns_from(grad_pre_activation, first_column), sizes.rows, width, 2 * width);
  };
  typename Epilogue<QuantizedGradients, kKeptFp8>::Arguments epilogue;
  epilogue.grad_gate = half(0);
  epilogue.grad_up = half(width);
  epilogue.activation = open_rows(weighted_activation, sizes.rows, width, width);
  epilogue.quantization = gradient_rows(sizes, quantized_grad, grad_scales);
  launch<true, QuantizedGradients, kKeptFp8>(operands, epilogue, grad_weight_parts, stream);
}

template <bool kKeptFp8>
void launch_columns(const Operands& operands, const float* hidden_states_scales,
                    void* quantized_grad, float* grad_scales, const Fp8Columns& gradient,
                    const Fp8Columns& activation, float* grad_weight_parts, void* stream) {
  const ExpertSizes& sizes = operands.sizes;
  const auto stored = [](const Fp8Columns& columns, int width) {
    return StoredColumns{static_cast<uint8_t*>(columns.data), columns.scales, width};
  };
  typename Epilogue<GradientColumns, kKeptFp8>::Arguments epilogue;
  epilogue.quantization = {
      .rows = gradient_rows(sizes, quantized_grad, grad_scales),
      .gradient = stored(gradient, 2 * sizes.width),
      .activation = stored(activation, sizes.width),
      .hidden_states_scales = hidden_states_scales,
      .grad_out_scales = operands.grad_out.scales,
      .scales_of_a_token = sizes.hidden_size / kScaleBlock,
      .slots_of_a_token = sizes.experts_of_token,
      .groups = row_groups(sizes, operands.rows),
  };
  const auto launch_rows = are_gathered(operands.rows) ? launch<true, GradientColumns, kKeptFp8>
                                                       : launch<false, GradientColumns, kKeptFp8>;
  launch_rows(operands, epilogue, grad_weight_parts, stream);
}

}  // namespace
}  // namespace sm90

int fp8_experts_grad_weight_parts(const ExpertSizes& sizes) { return sizes.width / kScaleBlock; }

int64_t fp8_column_tiles(const ExpertSizes& sizes) {
  return sm90::first_column_tile(sizes.rows, sizes.experts);
}

void fp8_experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                               const Fp8Rows& grad_out, const Fp8Weights& down,
                               const KeptPreActivation& kept, void* grad_pre_activation,
                               void* quantized_grad, float* grad_scales, void* weighted_activation,
                               float* grad_weight_parts, void* stream) {
  if (sizes.rows == 0) return;
  sm90::enter_device();
  const auto launch =
      kept.scales == nullptr ? sm90::launch_beside_bf16<false> : sm90::launch_beside_bf16<true>;
  launch({sizes, rows, grad_out, down, kept}, grad_pre_activation, quantized_grad, grad_scales,
         weighted_activation, grad_weight_parts, stream);
}

void fp8_experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                               const Fp8Rows& grad_out, const Fp8Weights& down,
                               const KeptPreActivation& kept, const float* hidden_states_scales,
                               void* quantized_grad, float* grad_scales, const Fp8Columns& gradient,
                               const Fp8Columns& activation, float* grad_weight_parts,
                               void* stream) {
  if (sizes.rows == 0) return;
  sm90::enter_device();
  const auto launch =
      kept.scales == nullptr ? sm90::launch_columns<false> : sm90::launch_columns<true>;
  launch({sizes, rows, grad_out, down, kept}, hidden_states_scales, quantized_grad, grad_scales,
         gradient, activation, grad_weight_parts, stream);
}

}  // namespace megatron_kanana
