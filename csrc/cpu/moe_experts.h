// Gated feed-forward networks of many experts on a CPU, down(silu(gate(x)) * up(x)), in fp32; bf16
// is widened when it is read. Free of torch headers.
//
// Rows, pairs of a token and an expert, are sorted by expert and cut into blocks, and blocks are
// taken in waves, so that working memory is limited. Whoever calls runs the numbered pieces of a
// step, in any order and on any threads, each thread with scratch memory of its own, then those of
// the next step; results do not depend on which thread takes what. A wave's steps are pack and
// forward, or pack, backward and weight gradients; after all waves comes combine.
#pragma once

#include <cstdint>
#include <vector>

#include "strided_rows.h"

namespace megatron_kanana::cpu {

constexpr int64_t kBlockRows = 64;  // rows of a block
constexpr int64_t kPadding = 32;    // widths are padded to multiples of it: a block's of products

// Rows of one expert. Each expert's rows are padded to a multiple of eight.
struct RowBlock {
  int64_t expert;
  int64_t used_expert;  // number among the experts that have rows
  int64_t first_row;
  int64_t count;
  int64_t padded_row;  // where the first lies among all padded rows
};

// Blocks that are computed at a time.
struct Wave {
  int64_t first_block, end_block;
  int64_t first_used_expert, end_used_expert;
  int64_t first_padded_row, end_padded_row;
};

struct ExpertsProblem {
  int64_t tokens;
  int64_t slots;
  int64_t experts;
  int64_t hidden;
  int64_t width;
  Dtype dtype;
  const int32_t* slot_of_row;  // null: row i is token i, which has one slot
  const int32_t* row_of_slot;  // null with it

  int64_t padded_hidden() const { return (hidden + kPadding - 1) / kPadding * kPadding; }
  int64_t padded_width() const { return (width + kPadding - 1) / kPadding * kPadding; }
  // Floats from one row of a copy to the next, see StridedTensor. Rows of gate and up are those of
  // gate, padded, and then those of up.
  int64_t hidden_stride() const { return padded_hidden() + kWidthUnit; }
  int64_t width_stride() const { return padded_width() + kWidthUnit; }
  int64_t gate_up_stride() const { return 2 * padded_width() + kWidthUnit; }
};

// The rows of all experts as blocks, and each row's place among padded rows.
struct RowLayout {
  std::vector<RowBlock> blocks;
  std::vector<int64_t> used_experts;
  std::vector<int32_t> padded_row_of_row;
  int64_t padded_rows = 0;

  RowLayout(const int32_t* offsets, int64_t experts);

  // Waves whose rows take `floats_of_row` each and whose experts `floats_of_expert` each, together
  // at most `floats` where a wave has more than one block.
  std::vector<Wave> waves(int64_t floats_of_row, int64_t floats_of_expert, int64_t floats) const;
};

// Weights of a wave's experts laid out for products, see moe_products.h.
struct Panels {
  float* data;
  // Forward: gate_up transposed and down transposed. Backward: both as they are.
  bool transposed;
  int64_t first_used_expert;

  int64_t floats_of_gate_up(const ExpertsProblem& problem) const {
    return 2 * problem.padded_width() * (transposed ? problem.hidden : problem.padded_hidden());
  }
  int64_t floats_of_down(const ExpertsProblem& problem) const {
    return transposed ? problem.padded_hidden() * problem.width
                      : problem.padded_width() * problem.hidden;
  }
  int64_t floats_of_expert(const ExpertsProblem& problem) const {
    return floats_of_gate_up(problem) + floats_of_down(problem);
  }
  float* gate_up(const ExpertsProblem& problem, int64_t used_expert) const {
    return data + (used_expert - first_used_expert) * floats_of_expert(problem);
  }
  float* down(const ExpertsProblem& problem, int64_t used_expert) const {
    return gate_up(problem, used_expert) + floats_of_gate_up(problem);
  }
};

struct ExpertWeights {
  const void* gate_up;  // [experts, 2 * width, hidden]
  const void* down;     // [experts, hidden, width]
};

struct ForwardRows {
  const void* hidden_states;  // [tokens, hidden]
  void* pre_activation;       // [rows, 2 * width]
  float* out_rows;            // [padded rows, hidden stride]
};

struct BackwardRows {
  const void* grad_out;        // [tokens, hidden]
  const void* hidden_states;   // [tokens, hidden]
  const void* pre_activation;  // [rows, 2 * width]
  const float* weights;        // [tokens, slots]; null: all are 1
  float* grad_weights;         // [tokens, slots], null with it; written where a slot has a row
  float* grad_hidden_rows;     // [padded rows, hidden stride]
  // Of the padded rows of a wave: copies of the two inputs, and what is computed.
  int64_t first_padded_row;
  float* grad_out_rows;    // hidden stride
  float* hidden_rows;      // hidden stride
  float* grad_pre_rows;    // gate_up stride
  float* activation_rows;  // width stride; times the row's weight

  static int64_t floats_of_row(const ExpertsProblem& problem) {
    return 2 * problem.hidden_stride() + problem.gate_up_stride() + problem.width_stride();
  }
};

struct WeightGradients {
  float* gate_up;  // [experts, 2 * width, hidden], added to
  float* down;     // [experts, hidden, width], added to
};

// Pieces of each step; forward and backward have the wave's blocks as pieces.
int64_t pack_pieces(const ExpertsProblem& problem, const Wave& wave);
int64_t weight_gradient_pieces(const ExpertsProblem& problem, const Wave& wave);
int64_t combine_pieces(const ExpertsProblem& problem);

// Floats that one thread's scratch must have, for any step.
int64_t experts_scratch(const ExpertsProblem& problem);

void pack_piece(const ExpertsProblem& problem, const RowLayout& layout,
                const ExpertWeights& weights, const Panels& panels, int64_t piece);

void experts_forward_block(const ExpertsProblem& problem, const RowBlock& block,
                           const Panels& panels, const ForwardRows& rows, float* scratch);

void experts_backward_block(const ExpertsProblem& problem, const RowBlock& block,
                            const Panels& panels, const BackwardRows& rows, float* scratch);

void weight_gradient_piece(const ExpertsProblem& problem, const RowLayout& layout, const Wave& wave,
                           const BackwardRows& rows, const WeightGradients& gradients,
                           int64_t piece, float* scratch);

// out [tokens, hidden] = the sum over a token's slots that have a row of weight * row; `weights`
// null: all are 1.
void combine_piece(const ExpertsProblem& problem, const RowLayout& layout, const float* rows,
                   const float* weights, void* out, int64_t piece, float* scratch);

}  // namespace megatron_kanana::cpu
