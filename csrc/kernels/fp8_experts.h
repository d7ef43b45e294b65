// Launchers of the experts' products in fp8 (e4m3). As in moe.h; D and N are multiples of 128.
//
// A quantised tensor is its 8-bit numbers and the fp32 scales of its blocks of 128 columns of a
// row, or of 128 x 128 weights. Weights come in both orders, as the tensor cores sum along rows
// alone.
#pragma once

#include "moe.h"

namespace megatron_kanana {

constexpr int kFp8WidthUnit = 128;  // hidden size and width are multiples of it
constexpr int kFp8ColumnTileRows = 64;

struct Fp8Rows {
  const void* data;     // e4m3 [rows, width]
  const float* scales;  // [rows, width / 128]
};

struct Fp8Weights {
  const void* data;     // e4m3 [E, rows, columns], or where asked for [E, columns, rows]
  const float* scales;  // [E, rows / 128, columns / 128] in either case
};

// data e4m3 [rows, width] and scales from values bf16 [rows, width].
void fp8_quantize_rows(const void* values, int64_t rows, int width, void* data, float* scales,
                       void* stream);

// The same with one scale a row, which stands in every block of it.
void fp8_quantize_whole_rows(const void* values, int64_t rows, int width, void* data, float* scales,
                             void* stream);

// data e4m3 [E, rows, columns], transposed e4m3 [E, columns, rows] and scales from values bf16.
void fp8_quantize_weights(const void* values, int experts, int rows, int columns, void* data,
                          void* transposed, float* scales, void* stream);

// The pre-activation as it is kept for the backward pass: bf16 [rows, 2N], or where there are
// scales e4m3 [rows, 2N] with scales [rows, 2N / 128], in an order within each 16 columns that
// fp8_experts_down_backward alone knows.
struct KeptPreActivation {
  void* data;
  float* scales;
};

// As experts_up_forward; activation and its scales are outputs, and so is what is kept.
void fp8_experts_up_forward(const ExpertSizes& sizes, const ExpertRows& rows,
                            const Fp8Rows& hidden_states, const Fp8Weights& gate_up,
                            const KeptPreActivation& kept, void* activation,
                            float* activation_scales, void* stream);

// As experts_down_forward; out is bf16.
void fp8_experts_down_forward(const ExpertSizes& sizes, const ExpertRows& rows,
                              const Fp8Rows& activation, const Fp8Weights& down, void* out,
                              void* stream);

int fp8_experts_grad_weight_parts(const ExpertSizes& sizes);

// As experts_down_backward, with down transposed, [E, N, D]. The gradient of the pre-activation
// comes in bf16, for the weights' gradients, and quantised, for the rows'. It may take the place of
// a pre-activation that is kept in bf16.
void fp8_experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                               const Fp8Rows& grad_out, const Fp8Weights& down,
                               const KeptPreActivation& kept, void* grad_pre_activation,
                               void* quantized_grad, float* grad_scales, void* weighted_activation,
                               float* grad_weight_parts, void* stream);

// Rows as products take them that sum over rows. Each 64 rows of an expert, from its first one on,
// are a tile, e4m3 [columns, 64], in an order that these kernels alone know, with a scale for each
// 128 columns, which two tiles of 128 rows share.
struct Fp8Columns {
  void* data;     // [tiles, columns, 64]
  float* scales;  // [tiles, columns / 128]
};

int64_t fp8_column_tiles(const ExpertSizes& sizes);

// The same with all that the weights' gradients take quantised: `gradient`, of the pre-activation,
// and `activation`. They are multiplied by the scales of the rows of hidden_states and of grad_out
// they are to meet, which whole rows have: a scale that differs from row to row can't be taken out
// of a sum over rows.
void fp8_experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                               const Fp8Rows& grad_out, const Fp8Weights& down,
                               const KeptPreActivation& kept, const float* hidden_states_scales,
                               void* quantized_grad, float* grad_scales, const Fp8Columns& gradient,
                               const Fp8Columns& activation, float* grad_weight_parts,
                               void* stream);

// As experts_grad_down and experts_grad_gate_up, of whole rows of e4m3. `sums_are_zero`: the
// gradient is zero so far, and need not be read.
void fp8_experts_grad_down(const ExpertSizes& sizes, const ExpertRows& rows, const void* grad_out,
                           const Fp8Columns& activation, float* grad_down, bool sums_are_zero,
                           void* stream);
void fp8_experts_grad_gate_up(const ExpertSizes& sizes, const ExpertRows& rows,
                              const Fp8Columns& gradient, const void* hidden_states,
                              float* grad_gate_up, bool sums_are_zero, void* stream);

// As experts_up_backward, with gate_up transposed, [E, D, 2N]; grad_rows is bf16.
void fp8_experts_up_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                             const Fp8Rows& grad_pre_activation, const Fp8Weights& gate_up,
                             void* grad_rows, void* stream);

}  // namespace megatron_kanana
