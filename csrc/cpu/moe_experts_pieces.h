// Pieces of the experts' forward and backward pass. Included once for each target, see vectors.h.
#pragma once

#include "moe_products.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

// Rows of a block of weight gradients.
constexpr int64_t kGradientRows = 64;

inline int64_t padded_to_rows(int64_t count) { return (count + 7) / 8 * 8; }

inline WeightMatrix gate_up_matrix(const ExpertsProblem& problem, const ExpertWeights& weights,
                                   int64_t expert) {
  return {weights.gate_up, problem.dtype,          expert * 2 * problem.width * problem.hidden,
          problem.width,   problem.padded_width(), problem.hidden};
}

inline WeightMatrix down_matrix(const ExpertsProblem& problem, const ExpertWeights& weights,
                                int64_t expert) {
  return {weights.down,   problem.dtype,           expert * problem.hidden * problem.width,
          problem.hidden, problem.padded_hidden(), problem.width};
}

// Panel `panel` of an expert: first those of gate_up, then those of down, then none.
inline void pack_piece(const ExpertsProblem& problem, int64_t expert, int64_t used_expert,
                       const ExpertWeights& weights, const Panels& panels, int64_t panel) {
  const WeightMatrix gate_up = gate_up_matrix(problem, weights, expert);
  const WeightMatrix down = down_matrix(problem, weights, expert);
  float* const gate_up_panels = panels.gate_up(problem, used_expert);
  float* const down_panels = panels.down(problem, used_expert);
  const int64_t gate_up_columns =
      panels.transposed ? 2 * problem.padded_width() : problem.padded_hidden();
  const int64_t behind = panel - gate_up_columns / kColumn;
  const int64_t down_columns = panels.transposed ? problem.padded_hidden() : problem.padded_width();
  if (behind < 0 && panels.transposed) {
    pack_transposed_panel(gate_up, panel, gate_up_panels);
  } else if (behind < 0) {
    pack_panel(gate_up, 2 * problem.padded_width(), panel, gate_up_panels);
  } else if (behind < down_columns / kColumn && panels.transposed) {
    pack_transposed_panel(down, behind, down_panels);
  } else if (behind < down_columns / kColumn) {
    pack_panel(down, problem.hidden, behind, down_panels);
  }
}

// Memory of one thread, cut from its scratch.
struct ExpertsScratch {
  float* hidden;      // [kBlockRows, hidden stride]
  float* gate_up;     // [kBlockRows, gate_up stride]
  float* activation;  // [kBlockRows, width stride]
  float* end;

  ExpertsScratch(const ExpertsProblem& problem, float* scratch)
      : hidden(scratch),
        gate_up(hidden + kBlockRows * problem.hidden_stride()),
        activation(gate_up + kBlockRows * problem.gate_up_stride()),
        end(activation + kBlockRows * problem.width_stride()) {}
};

inline int64_t experts_scratch(const ExpertsProblem& problem) {
  float* const none = nullptr;
  const int64_t of_blocks = ExpertsScratch(problem, none).end - none;
  const int64_t wider = problem.padded_hidden() > problem.padded_width() ? problem.padded_hidden()
                                                                         : problem.padded_width();
  const int64_t of_gradients = kGradientRows * (wider + kWidthUnit);
  return of_blocks > of_gradients ? of_blocks : of_gradients;
}

inline int64_t slot_of(const ExpertsProblem& problem, int64_t row) {
  return problem.slot_of_row == nullptr ? row : problem.slot_of_row[row];
}

// The tokens of a block's rows, and rows of zeros to a multiple of eight.
inline void gather_rows(const ExpertsProblem& problem, const RowBlock& block, const void* source,
                        float* rows) {
  const int64_t stride = problem.hidden_stride();
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t token = slot_of(problem, block.first_row + i) / problem.slots;
    read_row(source, problem.dtype, token * problem.hidden, problem.hidden, problem.padded_hidden(),
             rows + i * stride);
  }
  const int64_t missing = padded_to_rows(block.count) - block.count;
  __builtin_memset(rows + block.count * stride, 0, missing * stride * sizeof(float));
}

inline void experts_forward_block(const ExpertsProblem& problem, const RowBlock& block,
                                  const Panels& panels, const ForwardRows& rows,
                                  float* scratch_data) {
  const ExpertsScratch scratch(problem, scratch_data);
  const int64_t padded_rows = padded_to_rows(block.count), half = problem.padded_width();
  gather_rows(problem, block, rows.hidden_states, scratch.hidden);
  product_with_panels(scratch.hidden, problem.hidden_stride(), padded_rows,
                      panels.gate_up(problem, block.used_expert), problem.hidden, 2 * half,
                      scratch.gate_up, problem.gate_up_stride());
  for (int64_t i = 0; i < padded_rows; ++i) {
    const float* const gate = scratch.gate_up + i * problem.gate_up_stride();
    const float* const up = gate + half;
    float* const activation = scratch.activation + i * problem.width_stride();
    for (int64_t n = 0; n < half; n += kVector) {
      const Floats x = load(gate + n);
      store(activation + n, x * sigmoid(x) * load(up + n));
    }
    if (i < block.count) {
      const int64_t place = (block.first_row + i) * 2 * problem.width;
      write_row(gate, problem.width, rows.pre_activation, problem.dtype, place);
      write_row(up, problem.width, rows.pre_activation, problem.dtype, place + problem.width);
    }
  }
  product_with_panels(
      scratch.activation, problem.width_stride(), padded_rows,
      panels.down(problem, block.used_expert), problem.width, problem.padded_hidden(),
      rows.out_rows + block.padded_row * problem.hidden_stride(), problem.hidden_stride());
}

// From the gradient of a row's activation before its weight, and its pre-activation: the gradient
// of the pre-activation and the weighted activation. Returns the gradient of the weight.
inline float backward_row(const float* grad_activation, const float* pre_activation, int64_t half,
                          float weight, float* grad_pre, float* weighted_activation) {
  Floats grad_weight = {};
  for (int64_t n = 0; n < half; n += kVector) {
    const Floats gate = load(pre_activation + n), up = load(pre_activation + half + n);
    const Floats grad = load(grad_activation + n);
    const Floats gated = sigmoid(gate);
    const Floats silu = gate * gated;
    grad_weight += grad * (silu * up);
    const Floats weighted = grad * weight;
    store(weighted_activation + n, silu * up * weight);
    store(grad_pre + n, weighted * up * (gated * (1.0f + gate * (1.0f - gated))));
    store(grad_pre + half + n, weighted * silu);
  }
  float sum = 0.0f;
#pragma GCC unroll 16
  for (int lane = 0; lane < kVector; ++lane) sum += grad_weight[lane];
  return sum;
}

inline void experts_backward_block(const ExpertsProblem& problem, const RowBlock& block,
                                   const Panels& panels, const BackwardRows& rows,
                                   float* scratch_data) {
  const ExpertsScratch scratch(problem, scratch_data);
  const int64_t padded_rows = padded_to_rows(block.count), half = problem.padded_width();
  const int64_t hidden_stride = problem.hidden_stride();
  const int64_t place = block.padded_row - rows.first_padded_row;
  float* const grad_out = rows.grad_out_rows + place * hidden_stride;
  float* const grad_pre = rows.grad_pre_rows + place * problem.gate_up_stride();
  float* const activation = rows.activation_rows + place * problem.width_stride();
  gather_rows(problem, block, rows.grad_out, grad_out);
  gather_rows(problem, block, rows.hidden_states, rows.hidden_rows + place * hidden_stride);
  product_with_panels(grad_out, hidden_stride, padded_rows, panels.down(problem, block.used_expert),
                      problem.hidden, half, scratch.activation, problem.width_stride());
  for (int64_t i = 0; i < padded_rows; ++i) {
    float* const grad_pre_row = grad_pre + i * problem.gate_up_stride();
    float* const activation_row = activation + i * problem.width_stride();
    if (i >= block.count) {
      __builtin_memset(grad_pre_row, 0, 2 * half * sizeof(float));
      __builtin_memset(activation_row, 0, half * sizeof(float));
      continue;
    }
    const int64_t row = block.first_row + i, slot = slot_of(problem, row);
    for (int64_t part = 0; part < 2; ++part) {
      read_row(rows.pre_activation, problem.dtype, (2 * row + part) * problem.width, problem.width,
               half, scratch.gate_up + part * half);
    }
    const float weight = rows.weights == nullptr ? 1.0f : rows.weights[slot];
    const float grad_weight =
        backward_row(scratch.activation + i * problem.width_stride(), scratch.gate_up, half, weight,
                     grad_pre_row, activation_row);
    if (rows.grad_weights != nullptr) rows.grad_weights[slot] = grad_weight;
  }
  product_with_panels(grad_pre, problem.gate_up_stride(), padded_rows,
                      panels.gate_up(problem, block.used_expert), 2 * half, problem.padded_hidden(),
                      rows.grad_hidden_rows + block.padded_row * hidden_stride, hidden_stride);
}

// Adds left^T @ right over all rows of an expert, for kGradientRows columns of `left` from `first`
// on, to rows of `target` [.., width]. Of the padded halves of left's columns, those behind `half`
// are no rows of the target.
inline void add_weight_gradient(const float* left, int64_t left_stride, int64_t first, int64_t end,
                                int64_t half, int64_t padded_half, const float* right,
                                int64_t right_stride, int64_t depth, int64_t padded_width,
                                int64_t width, float* target, float* scratch) {
  const int64_t count = least(kGradientRows, end - first), stride = padded_width + kWidthUnit;
  product<Left::kColumnByColumn>(left + first, left_stride, count, right, right_stride, kColumn,
                                 depth, padded_width, scratch, stride);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t within = (first + i) % padded_half;
    if (within >= half) continue;
    float* const row = target + ((first + i) / padded_half * half + within) * width;
    for (int64_t column = 0; column < width; ++column) row[column] += scratch[i * stride + column];
  }
}

// Block `block` of an expert's gradients, first those of gate_up, then those of down, from the
// wave's rows [first_row, end_row).
inline void weight_gradient_block(const ExpertsProblem& problem, int64_t expert, int64_t first_row,
                                  int64_t end_row, const BackwardRows& rows,
                                  const WeightGradients& gradients, int64_t block, float* scratch) {
  const int64_t gate_up_columns = 2 * problem.padded_width();
  const int64_t gate_up_blocks = (gate_up_columns + kGradientRows - 1) / kGradientRows;
  const int64_t weights = problem.width * problem.hidden, depth = end_row - first_row;
  if (block < gate_up_blocks) {
    add_weight_gradient(
        rows.grad_pre_rows + first_row * problem.gate_up_stride(), problem.gate_up_stride(),
        block * kGradientRows, gate_up_columns, problem.width, problem.padded_width(),
        rows.hidden_rows + first_row * problem.hidden_stride(), problem.hidden_stride(), depth,
        problem.padded_hidden(), problem.hidden, gradients.gate_up + expert * 2 * weights, scratch);
  } else {
    add_weight_gradient(rows.grad_out_rows + first_row * problem.hidden_stride(),
                        problem.hidden_stride(), (block - gate_up_blocks) * kGradientRows,
                        problem.padded_hidden(), problem.hidden, problem.padded_hidden(),
                        rows.activation_rows + first_row * problem.width_stride(),
                        problem.width_stride(), depth, problem.padded_width(), problem.width,
                        gradients.down + expert * weights, scratch);
  }
}

inline void combine_token(const ExpertsProblem& problem, const int32_t* padded_row_of_row,
                          const float* rows, const float* weights, int64_t token, float* sum) {
  const int64_t padded = problem.padded_hidden();
  __builtin_memset(sum, 0, padded * sizeof(float));
  for (int64_t slot = token * problem.slots; slot < (token + 1) * problem.slots; ++slot) {
    const int64_t row = problem.row_of_slot == nullptr ? slot : problem.row_of_slot[slot];
    if (row < 0) continue;
    const float* const source = rows + padded_row_of_row[row] * problem.hidden_stride();
    const float weight = weights == nullptr ? 1.0f : weights[slot];
    for (int64_t column = 0; column < padded; column += kVector) {
      store(sum + column, load(sum + column) + load(source + column) * weight);
    }
  }
}

inline void combine_tokens(const ExpertsProblem& problem, const int32_t* padded_row_of_row,
                           const float* rows, const float* weights, void* out, int64_t begin,
                           int64_t end, float* scratch) {
  for (int64_t token = begin; token < end; ++token) {
    combine_token(problem, padded_row_of_row, rows, weights, token, scratch);
    write_row(scratch, problem.hidden, out, problem.dtype, token * problem.hidden);
  }
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET
