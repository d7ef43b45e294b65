// Launchers of the mixture-of-experts kernels. Free of torch headers; pointers are device memory.
//
// T tokens, K experts a token, E experts of this process, M rows: the (token, expert) pairs
// computed here, sorted by expert. D hidden size, N width of an expert; both multiples of 64. A
// slot is token * K + k. Every result has the same bits run to run. All throw std::runtime_error
// where CUDA refuses.
#pragma once

#include <cstdint>

namespace megatron_kanana {

constexpr int kMaxExperts = 512;
constexpr int kMaxExpertsOfAToken = 32;
constexpr int kMaxExpertGroups = 32;
constexpr int kExpertWidthUnit = 64;  // hidden size and width of an expert are multiples of it
constexpr int kMaxCounts = 12288;     // as many as shared memory has without asking for more

struct ExpertSizes {
  int tokens;            // T
  int experts_of_token;  // K
  int experts;           // E
  int rows;              // M
  int hidden_size;       // D
  int width;             // N
};

// How the tokens are dealt to experts. All null for one expert of all tokens (K = E = 1, M = T).
struct ExpertRows {
  const int32_t* offsets;      // [E + 1] first row of each expert
  const int32_t* slot_of_row;  // [M]
  const int32_t* row_of_slot;  // [T, K], -1 where the expert is elsewhere
  const float* weights;        // [T, K]
};

// --- routing -----------------------------------------------------------------------------------

struct RoutingSizes {
  int tokens;
  int experts;           // of all processes, at most kMaxExperts
  int experts_of_token;  // at most kMaxExpertsOfAToken
  int groups;            // at most kMaxExpertGroups
  int groups_of_token;
  float scaling_factor;
};

// weights fp32 [T, K] and experts [T, K] from logits fp32 [T, experts] and bias fp32 [experts] or
// null: DeepSeek-V3, section 2.1.2.
void moe_route(const RoutingSizes& sizes, const float* logits, const float* bias, float* weights,
               int32_t* experts, void* stream);
void moe_route_backward(const RoutingSizes& sizes, const float* grad_weights, const float* logits,
                        const int32_t* experts, float* grad_logits, void* stream);

// Adds the tokens of each expert to counts [experts], at most kMaxCounts: experts may be numbered
// apart for each sequence. padding [T] or null.
void moe_count(const RoutingSizes& sizes, const int32_t* experts, const bool* padding,
               float* counts, void* stream);

// Bytes of device memory moe_permutation needs.
int64_t moe_permutation_workspace_bytes(int64_t slots, int experts);
// Rows beyond `rows`, the caller's number of slots that are not -1, are not written.
void moe_permutation(const int32_t* experts_of_slots, int64_t slots, int experts, int64_t rows,
                     int32_t* offsets, int32_t* slot_of_row, int32_t* row_of_slot, void* workspace,
                     void* stream);

// --- experts -----------------------------------------------------------------------------------

// pre_activation [M, 2N] = hidden_states[token of row] gate_up[expert]^T;
// activation [M, N] = silu(gate) * up.
void experts_up_forward(const ExpertSizes& sizes, const ExpertRows& rows, const void* hidden_states,
                        const void* gate_up, void* pre_activation, void* activation, void* stream);

// out [M, D] = activation down[expert]^T.
void experts_down_forward(const ExpertSizes& sizes, const ExpertRows& rows, const void* activation,
                          const void* down, void* out, void* stream);

// Column tiles of experts_down_backward, each of which leaves a part of the weights' gradients.
int experts_grad_weight_parts(const ExpertSizes& sizes);

// From grad_out [T, D]: grad_pre_activation [M, 2N], activation [M, N] times the row's weight, and
// grad_weight_parts fp32 [M, parts] of the weights' gradients. Null where there are no weights.
// grad_pre_activation may be pre_activation itself.
void experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows, const void* grad_out,
                           const void* down, const void* pre_activation, void* grad_pre_activation,
                           void* weighted_activation, float* grad_weight_parts, void* stream);

// grad_rows [M, D] = grad_pre_activation gate_up[expert].
void experts_up_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                         const void* grad_pre_activation, const void* gate_up, void* grad_rows,
                         void* stream);

// grad_down fp32 [E, D, N] += grad_out[token of row]^T weighted_activation, over the expert's rows.
void experts_grad_down(const ExpertSizes& sizes, const ExpertRows& rows, const void* grad_out,
                       const void* weighted_activation, float* grad_down, void* stream);

// grad_gate_up fp32 [E, 2N, D] += grad_pre_activation^T hidden_states[token of row].
void experts_grad_gate_up(const ExpertSizes& sizes, const ExpertRows& rows,
                          const void* grad_pre_activation, const void* hidden_states,
                          float* grad_gate_up, void* stream);

// out [T, D] = sum over k of weights[t, k] * values[row_of_slot[t, k], :] (weights null: 1).
void experts_combine(const ExpertSizes& sizes, const ExpertRows& rows, const void* values,
                     const float* weights, void* out, void* stream);

// grad_weights [T, K] = sum of the row's `parts` parts; zero for slots elsewhere.
void experts_grad_weights(const ExpertSizes& sizes, const ExpertRows& rows,
                          const float* grad_weight_parts, int parts, float* grad_weights,
                          void* stream);

}  // namespace megatron_kanana
