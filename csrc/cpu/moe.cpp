#include <algorithm>
#include <string_view>

#include "flash_attention.h"
#include "moe_target.h"

namespace megatron_kanana::cpu {
namespace {

constexpr int64_t kCombinedTokens = 64;  // of a piece
constexpr int64_t kRowUnit = 8;

const MoeTarget& choose_target() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const std::string_view instructions = instruction_set();
  if (instructions == "avx512") return kMoeAvx512;
  if (instructions == "avx2") return kMoeAvx2;
#endif
  return kMoeBaseline;
}

const MoeTarget& target() {
  static const MoeTarget& chosen = choose_target();
  return chosen;
}

int64_t blocks_of(int64_t columns) {
  return (columns + target().gradient_rows - 1) / target().gradient_rows;
}

int64_t gradient_blocks(const ExpertsProblem& problem) {
  return blocks_of(2 * problem.padded_width()) + blocks_of(problem.padded_hidden());
}

// More than there are, where the two directions differ.
int64_t panels_of_expert(const ExpertsProblem& problem) {
  return (std::max(2 * problem.padded_width(), problem.padded_hidden()) +
          std::max(problem.padded_width(), problem.padded_hidden())) /
         target().column;
}

}  // namespace

RowLayout::RowLayout(const int32_t* offsets, int64_t experts)
    : first_padded_row(experts), end_padded_row(experts), padded_row_of_row(offsets[experts]) {
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t begin = offsets[expert], end = offsets[expert + 1];
    first_padded_row[expert] = padded_rows;
    end_padded_row[expert] = padded_rows + end - begin;
    if (begin < end) used_experts.push_back(expert);
    for (int64_t row = begin; row < end; row += kBlockRows) {
      blocks.push_back({expert, row, std::min(kBlockRows, end - row), padded_rows + row - begin});
    }
    for (int64_t row = begin; row < end; ++row) {
      padded_row_of_row[row] = static_cast<int32_t>(padded_rows + row - begin);
    }
    padded_rows += (end - begin + kRowUnit - 1) / kRowUnit * kRowUnit;
  }
}

int64_t routing_scratch(const RoutingProblem& problem) { return target().routing_scratch(problem); }

void route_piece(const RoutingProblem& problem, const float* logits, const float* bias,
                 float* weights, int32_t* chosen, int64_t piece, float* scratch) {
  target().route_piece(problem, logits, bias, weights, chosen, piece, scratch);
}

void route_backward_piece(const RoutingProblem& problem, const float* grad_weights,
                          const float* logits, const int32_t* chosen, float* grad_logits,
                          int64_t piece, float* scratch) {
  target().route_backward_piece(problem, grad_weights, logits, chosen, grad_logits, piece, scratch);
}

int64_t pack_pieces(const ExpertsProblem& problem, const RowLayout& layout) {
  return static_cast<int64_t>(layout.used_experts.size()) * panels_of_expert(problem);
}

int64_t weight_gradient_pieces(const ExpertsProblem& problem, const RowLayout& layout) {
  return static_cast<int64_t>(layout.used_experts.size()) * gradient_blocks(problem);
}

int64_t combine_pieces(const ExpertsProblem& problem) {
  return (problem.tokens + kCombinedTokens - 1) / kCombinedTokens;
}

int64_t experts_scratch(const ExpertsProblem& problem) { return target().experts_scratch(problem); }

void pack_piece(const ExpertsProblem& problem, const RowLayout& layout,
                const ExpertWeights& weights, const Panels& panels, int64_t piece) {
  const int64_t of_expert = panels_of_expert(problem);
  const int64_t expert = layout.used_experts[piece / of_expert];
  target().pack_piece(problem, expert, weights, panels, piece % of_expert);
}

void experts_forward_block(const ExpertsProblem& problem, const RowBlock& block,
                           const Panels& panels, const ForwardRows& rows, float* scratch) {
  target().experts_forward_block(problem, block, panels, rows, scratch);
}

void experts_backward_block(const ExpertsProblem& problem, const RowBlock& block,
                            const Panels& panels, const BackwardRows& rows, float* scratch) {
  target().experts_backward_block(problem, block, panels, rows, scratch);
}

void weight_gradient_piece(const ExpertsProblem& problem, const RowLayout& layout,
                           const BackwardRows& rows, const WeightGradients& gradients,
                           int64_t piece, float* scratch) {
  const int64_t of_expert = gradient_blocks(problem);
  const int64_t expert = layout.used_experts[piece / of_expert];
  target().weight_gradient_block(problem, expert, layout.first_padded_row[expert],
                                 layout.end_padded_row[expert], rows, gradients, piece % of_expert,
                                 scratch);
}

void combine_piece(const ExpertsProblem& problem, const RowLayout& layout, const float* rows,
                   const float* weights, void* out, int64_t piece, float* scratch) {
  const int64_t begin = piece * kCombinedTokens;
  target().combine_tokens(problem, layout.padded_row_of_row.data(), rows, weights, out, begin,
                          std::min(begin + kCombinedTokens, problem.tokens), scratch);
}

}  // namespace megatron_kanana::cpu
