// What all implementations of the mixture of experts ask of their arguments, each refused by name.
// Numbers inside tensors are checked by the implementation for a CPU alone, as a GPU would have to
// be waited for.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace megatron_kanana {

// Sizes of logits [tokens, experts] and of the choice [tokens, slots].
struct RouteSizes {
  int64_t tokens;
  int64_t experts;
  int64_t slots;
};

// Sizes of hidden states [tokens, hidden], weights [tokens, slots], gate_up [experts, 2 * width,
// hidden] and down [experts, hidden, width]; rows are pairs of a token and an expert.
struct ExpertsSizes {
  int64_t tokens;
  int64_t slots;
  int64_t rows;
  int64_t experts;
  int64_t hidden;
  int64_t width;
};

// Sizes of hidden states [tokens, hidden], gate_up [2 * width, hidden] and down [hidden, width].
struct GatedMlpSizes {
  int64_t tokens;
  int64_t hidden;
  int64_t width;
};

// Shape, dtype, device and contiguity; `peer_name` is the tensor whose device it must share.
inline void check_moe_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                             at::ScalarType dtype, const at::Tensor& peer, const char* peer_name) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.device() == peer.device(), name, " must be on ", peer.device(), " as ",
              peer_name, " is, got ", tensor.device());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

inline void check_moe_dimensions(const at::Tensor& tensor, const char* name, int64_t dimensions,
                                 const char* meaning) {
  TORCH_CHECK(tensor.dim() == dimensions, name, " must have shape ", meaning, ", got ",
              tensor.sizes());
}

// Slots and rows are numbered in int32.
inline void check_moe_slots(int64_t tokens, int64_t slots) {
  TORCH_CHECK(slots > 0, "there must be at least one expert a token, got ", slots);
  TORCH_CHECK(tokens <= std::numeric_limits<int32_t>::max() / slots,
              "tokens times experts a token must be below 2^31, got ", tokens, " times ", slots);
}

inline void check_scaling_factor(double scaling_factor) {
  TORCH_CHECK(std::isfinite(scaling_factor) && scaling_factor > 0,
              "scaling_factor must be positive and finite, got ", scaling_factor);
}

inline RouteSizes check_route(const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                              int64_t num_experts_per_token, int64_t num_groups,
                              int64_t groups_per_token, double scaling_factor) {
  check_moe_dimensions(logits, "logits", 2, "[tokens, experts]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_moe_tensor(logits, "logits", logits.sizes(), at::kFloat, logits, "logits");
  if (bias.has_value()) {
    check_moe_tensor(*bias, "expert_bias", {experts}, at::kFloat, logits, "logits");
  }
  check_moe_slots(tokens, num_experts_per_token);
  TORCH_CHECK(num_groups > 0 && experts % num_groups == 0,
              "num_groups must divide the number of experts, got ", num_groups, " for ", experts);
  TORCH_CHECK(groups_per_token > 0 && groups_per_token <= num_groups,
              "groups_per_token must be from 1 to num_groups = ", num_groups, ", got ",
              groups_per_token);
  const int64_t candidates = experts / num_groups * groups_per_token;
  TORCH_CHECK(num_experts_per_token <= candidates, "num_experts_per_token must be at most the ",
              candidates, " experts of a token's groups, got ", num_experts_per_token);
  check_scaling_factor(scaling_factor);
  return {tokens, experts, num_experts_per_token};
}

inline RouteSizes check_route_backward(const at::Tensor& grad_weights, const at::Tensor& logits,
                                       const at::Tensor& chosen, double scaling_factor) {
  check_moe_dimensions(logits, "logits", 2, "[tokens, experts]");
  check_moe_dimensions(chosen, "experts", 2, "[tokens, experts a token]");
  const int64_t tokens = logits.size(0), slots = chosen.size(1);
  check_moe_slots(tokens, slots);
  TORCH_CHECK(slots <= logits.size(1), "experts must have at most the ", logits.size(1),
              " experts of logits, got ", slots, " a token");
  check_moe_tensor(logits, "logits", logits.sizes(), at::kFloat, logits, "logits");
  check_moe_tensor(chosen, "experts", {tokens, slots}, at::kInt, logits, "logits");
  check_moe_tensor(grad_weights, "grad_weights", {tokens, slots}, at::kFloat, logits, "logits");
  check_scaling_factor(scaling_factor);
  return {tokens, logits.size(1), slots};
}

inline RouteSizes check_count(const at::Tensor& chosen, const std::optional<at::Tensor>& padding,
                              const at::Tensor& counts) {
  check_moe_dimensions(chosen, "experts", 2, "[tokens, experts a token]");
  check_moe_dimensions(counts, "counts", 1, "[experts]");
  const int64_t tokens = chosen.size(0), slots = chosen.size(1);
  check_moe_slots(tokens, slots);
  check_moe_tensor(chosen, "experts", chosen.sizes(), at::kInt, chosen, "experts");
  if (padding.has_value()) {
    check_moe_tensor(*padding, "padding", {tokens}, at::kBool, chosen, "experts");
  }
  check_moe_tensor(counts, "counts", counts.sizes(), at::kFloat, chosen, "experts");
  return {tokens, counts.size(0), slots};
}

inline RouteSizes check_permutation(const at::Tensor& chosen, int64_t num_experts,
                                    int64_t num_rows) {
  check_moe_dimensions(chosen, "experts", 2, "[tokens, experts a token]");
  const int64_t tokens = chosen.size(0), slots = chosen.size(1);
  check_moe_slots(tokens, slots);
  check_moe_tensor(chosen, "experts", chosen.sizes(), at::kInt, chosen, "experts");
  TORCH_CHECK(num_experts > 0 && num_experts < std::numeric_limits<int32_t>::max(),
              "num_experts must be positive, got ", num_experts);
  TORCH_CHECK(num_rows >= 0 && num_rows <= tokens * slots, "num_rows must be from 0 to the ",
              tokens * slots, " slots, got ", num_rows);
  return {tokens, num_experts, slots};
}

// The dtype of everything that is computed in that of the hidden states.
inline at::ScalarType check_hidden_states(const at::Tensor& hidden_states) {
  check_moe_dimensions(hidden_states, "hidden_states", 2, "[tokens, hidden size]");
  const at::ScalarType dtype = hidden_states.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16,
              "hidden_states must be float32 or bfloat16, got ", dtype);
  check_moe_tensor(hidden_states, "hidden_states", hidden_states.sizes(), dtype, hidden_states,
                   "hidden_states");
  return dtype;
}

// Hidden states, and the rows of a permutation of their slots to `experts` of `width`.
inline ExpertsSizes check_expert_rows(const at::Tensor& hidden_states, const at::Tensor& weights,
                                      const at::Tensor& offsets, const at::Tensor& slot_of_row,
                                      const at::Tensor& row_of_slot, int64_t experts,
                                      int64_t width) {
  check_hidden_states(hidden_states);
  check_moe_dimensions(weights, "weights", 2, "[tokens, experts a token]");
  check_moe_dimensions(slot_of_row, "slot_of_row", 1, "[rows]");
  const ExpertsSizes sizes = {hidden_states.size(0), weights.size(1),
                              slot_of_row.size(0),   experts,
                              hidden_states.size(1), width};
  const auto check = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                         at::ScalarType wanted) {
    check_moe_tensor(tensor, name, shape, wanted, hidden_states, "hidden_states");
  };
  check_moe_slots(sizes.tokens, sizes.slots);
  TORCH_CHECK(sizes.rows <= sizes.tokens * sizes.slots, "slot_of_row must have at most the ",
              sizes.tokens * sizes.slots, " slots, got ", sizes.rows);
  check(weights, "weights", {sizes.tokens, sizes.slots}, at::kFloat);
  check(slot_of_row, "slot_of_row", {sizes.rows}, at::kInt);
  check(row_of_slot, "row_of_slot", {sizes.tokens, sizes.slots}, at::kInt);
  check(offsets, "offsets", {sizes.experts + 1}, at::kInt);
  return sizes;
}

inline ExpertsSizes check_experts_forward(const at::Tensor& hidden_states,
                                          const at::Tensor& weights, const at::Tensor& offsets,
                                          const at::Tensor& slot_of_row,
                                          const at::Tensor& row_of_slot, const at::Tensor& gate_up,
                                          const at::Tensor& down) {
  const at::ScalarType dtype = check_hidden_states(hidden_states);
  check_moe_dimensions(down, "down", 3, "[experts, hidden size, width]");
  const ExpertsSizes sizes = check_expert_rows(hidden_states, weights, offsets, slot_of_row,
                                               row_of_slot, down.size(0), down.size(2));
  check_moe_tensor(down, "down", {sizes.experts, sizes.hidden, sizes.width}, dtype, hidden_states,
                   "hidden_states");
  check_moe_tensor(gate_up, "gate_up", {sizes.experts, 2 * sizes.width, sizes.hidden}, dtype,
                   hidden_states, "hidden_states");
  TORCH_CHECK(down.numel() > 0, "down must not be empty, got shape ", down.sizes());
  return sizes;
}

// What every backward pass takes beside what its forward pass took.
inline void check_moe_backward(const at::Tensor& grad_out, const at::Tensor& hidden_states,
                               const at::Tensor& gate_up, const at::Tensor& down,
                               const at::Tensor& pre_activation, int64_t rows,
                               const at::Tensor& grad_gate_up, const at::Tensor& grad_down) {
  const auto check = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                         at::ScalarType wanted) {
    check_moe_tensor(tensor, name, shape, wanted, hidden_states, "hidden_states");
  };
  const at::ScalarType dtype = hidden_states.scalar_type();
  check(grad_out, "grad_out", hidden_states.sizes(), dtype);
  check(pre_activation, "pre_activation", {rows, 2 * down.size(-1)}, dtype);
  check(grad_gate_up, "grad_gate_up", gate_up.sizes(), at::kFloat);
  check(grad_down, "grad_down", down.sizes(), at::kFloat);
}

inline ExpertsSizes check_experts_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& weights,
    const at::Tensor& offsets, const at::Tensor& slot_of_row, const at::Tensor& row_of_slot,
    const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& pre_activation,
    const at::Tensor& grad_gate_up, const at::Tensor& grad_down) {
  const ExpertsSizes sizes = check_experts_forward(hidden_states, weights, offsets, slot_of_row,
                                                   row_of_slot, gate_up, down);
  check_moe_backward(grad_out, hidden_states, gate_up, down, pre_activation, sizes.rows,
                     grad_gate_up, grad_down);
  return sizes;
}

inline GatedMlpSizes check_gated_mlp_forward(const at::Tensor& hidden_states,
                                             const at::Tensor& gate_up, const at::Tensor& down) {
  const at::ScalarType dtype = check_hidden_states(hidden_states);
  check_moe_dimensions(down, "down", 2, "[hidden size, width]");
  const GatedMlpSizes sizes = {hidden_states.size(0), hidden_states.size(1), down.size(1)};
  check_moe_slots(sizes.tokens, 1);
  check_moe_tensor(down, "down", {sizes.hidden, sizes.width}, dtype, hidden_states,
                   "hidden_states");
  check_moe_tensor(gate_up, "gate_up", {2 * sizes.width, sizes.hidden}, dtype, hidden_states,
                   "hidden_states");
  TORCH_CHECK(down.numel() > 0, "down must not be empty, got shape ", down.sizes());
  return sizes;
}

inline GatedMlpSizes check_gated_mlp_backward(const at::Tensor& grad_out,
                                              const at::Tensor& hidden_states,
                                              const at::Tensor& gate_up, const at::Tensor& down,
                                              const at::Tensor& pre_activation,
                                              const at::Tensor& grad_gate_up,
                                              const at::Tensor& grad_down) {
  const GatedMlpSizes sizes = check_gated_mlp_forward(hidden_states, gate_up, down);
  check_moe_backward(grad_out, hidden_states, gate_up, down, pre_activation, sizes.tokens,
                     grad_gate_up, grad_down);
  return sizes;
}

}  // namespace megatron_kanana
