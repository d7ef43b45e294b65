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
    : padded_row_of_row(offsets[experts]) {
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t begin = offsets[expert], end = offsets[expert + 1];
    if (begin == end) continue;
    const int64_t used_expert = static_cast<int64_t>(used_experts.size());
    used_experts.push_back(expert);
    const int64_t shift = padded_rows - begin;
    for (int64_t row = begin; row < end; row += kBlockRows) {
      const int64_t count = std::min(kBlockRows, end - row);
      blocks.push_back({expert, used_expert, row, count, row + shift});
    }
    for (int64_t row = begin; row < end; ++row) {
      padded_row_of_row[row] = static_cast<int32_t>(row + shift);
    }
    padded_rows = (end + shift + kRowUnit - 1) / kRowUnit * kRowUnit;
  }
}

std::vector<Wave> RowLayout::waves(int64_t floats_of_row, int64_t floats_of_expert,
                                   int64_t floats) const {
  std::vector<Wave> waves;
  int64_t taken = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    const RowBlock& block = blocks[i];
    const bool same_expert = i > 0 && block.used_expert == blocks[i - 1].used_expert;
    const int64_t of_rows = kBlockRows * floats_of_row;
    const int64_t wanted = of_rows + (same_expert ? 0 : floats_of_expert);
    if (waves.empty() || taken + wanted > floats) {
      waves.push_back({i, i, block.used_expert, block.used_expert, block.padded_row, 0});
      taken = of_rows + floats_of_expert;
    } else {
      taken += wanted;
    }
    waves.back().end_block = i + 1;
    waves.back().end_used_expert = block.used_expert + 1;
    waves.back().end_padded_row =
        (block.padded_row + block.count + kRowUnit - 1) / kRowUnit * kRowUnit;
  }
  return waves;
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

int64_t pack_pieces(const ExpertsProblem& problem, const Wave& wave) {
  return (wave.end_used_expert - wave.first_used_expert) * panels_of_expert(problem);
}

int64_t weight_gradient_pieces(const ExpertsProblem& problem, const Wave& wave) {
  return (wave.end_used_expert - wave.first_used_expert) * gradient_blocks(problem);
}

int64_t combine_pieces(const ExpertsProblem& problem) {
  return (problem.tokens + kCombinedTokens - 1) / kCombinedTokens;
}

int64_t experts_scratch(const ExpertsProblem& problem) { return target().experts_scratch(problem); }

void pack_piece(const ExpertsProblem& problem, const RowLayout& layout,
                const ExpertWeights& weights, const Panels& panels, int64_t piece) {
  const int64_t of_expert = panels_of_expert(problem);
  const int64_t used_expert = panels.first_used_expert + piece / of_expert;
  target().pack_piece(problem, layout.used_experts[used_expert], used_expert, weights, panels,
                      piece % of_expert);
}

void experts_forward_block(const ExpertsProblem& problem, const RowBlock& block,
                           const Panels& panels, const ForwardRows& rows, float* scratch) {
  target().experts_forward_block(problem, block, panels, rows, scratch);
}

void experts_backward_block(const ExpertsProblem& problem, const RowBlock& block,
                            const Panels& panels, const BackwardRows& rows, float* scratch) {
  target().experts_backward_block(problem, block, panels, rows, scratch);
}

void weight_gradient_piece(const ExpertsProblem& problem, const RowLayout& layout, const Wave& wave,
                           const BackwardRows& rows, const WeightGradients& gradients,
                           int64_t piece, float* scratch) {
  const int64_t of_expert = gradient_blocks(problem);
  const int64_t used_expert = wave.first_used_expert + piece / of_expert;
  const auto first = layout.blocks.begin() + wave.first_block;
  const auto end = layout.blocks.begin() + wave.end_block;
  const auto [begin_own, end_own] = std::equal_range(
      first, end, RowBlock{0, used_expert, 0, 0, 0},
      [](const RowBlock& x, const RowBlock& y) { return x.used_expert < y.used_expert; });
  const RowBlock& last = *(end_own - 1);
  target().weight_gradient_block(problem, last.expert,
                                 begin_own->padded_row - wave.first_padded_row,
                                 last.padded_row + last.count - wave.first_padded_row, rows,
                                 gradients, piece % of_expert, scratch);
}

void combine_piece(const ExpertsProblem& problem, const RowLayout& layout, const float* rows,
                   const float* weights, void* out, int64_t piece, float* scratch) {
  const int64_t begin = piece * kCombinedTokens;
  target().combine_tokens(problem, layout.padded_row_of_row.data(), rows, weights, out, begin,
                          std::min(begin + kCombinedTokens, problem.tokens), scratch);
}

}  // namespace megatron_kanana::cpu
