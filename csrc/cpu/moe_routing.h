// Routing of a mixture of experts on a CPU: the choice of experts with its gradient, counts, and
// the order of rows by expert. Free of torch headers.
#pragma once

#include <cstdint>

namespace megatron_kanana::cpu {

// A piece of routing is this many tokens.
constexpr int64_t kRoutingTokens = 64;

struct RoutingProblem {
  int64_t tokens;
  int64_t experts;
  int64_t slots;  // experts of a token
  int64_t groups;
  int64_t groups_per_token;
  float scaling_factor;

  int64_t pieces() const { return (tokens + kRoutingTokens - 1) / kRoutingTokens; }
};

// Floats that one thread's scratch must have.
int64_t routing_scratch(const RoutingProblem& problem);

// logits [tokens, experts], bias [experts] or null; weights and chosen [tokens, slots].
void route_piece(const RoutingProblem& problem, const float* logits, const float* bias,
                 float* weights, int32_t* chosen, int64_t piece, float* scratch);

// grad_logits [tokens, experts] is written as a whole.
void route_backward_piece(const RoutingProblem& problem, const float* grad_weights,
                          const float* logits, const int32_t* chosen, float* grad_logits,
                          int64_t piece, float* scratch);

// counts[e] += slots of expert e, of tokens that are no padding; `padding` may be null.
void count_tokens(const int32_t* chosen, int64_t tokens, int64_t slots, const bool* padding,
                  int64_t experts, float* counts);

// Sorts slots by expert, stably; those with expert -1 have no row. offsets [experts + 1].
void permute(const int32_t* chosen, int64_t slots, int64_t experts, int32_t* offsets,
             int32_t* slot_of_row, int32_t* row_of_slot);

}  // namespace megatron_kanana::cpu
