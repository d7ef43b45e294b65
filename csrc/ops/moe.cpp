// torch.library schemas of the mixture of experts: routing, permutation and experts.
#include <torch/library.h>

#include "moe_checks.h"

namespace megatron_kanana {

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "moe_route(Tensor logits, Tensor? expert_bias, int num_experts_per_token, int num_groups, "
      "int groups_per_token, float scaling_factor) -> (Tensor weights, Tensor experts)");
  library.def(
      "moe_route_backward(Tensor grad_weights, Tensor logits, Tensor experts, "
      "float scaling_factor) -> Tensor grad_logits");
  library.def("moe_count(Tensor experts, Tensor? padding, Tensor(a!) counts) -> ()");
  library.def(
      "moe_permutation(Tensor experts, int num_experts, int num_rows) "
      "-> (Tensor offsets, Tensor slot_of_row, Tensor row_of_slot)");
  library.def(
      "moe_experts_forward(Tensor hidden_states, Tensor weights, Tensor offsets, "
      "Tensor slot_of_row, Tensor row_of_slot, Tensor gate_up, Tensor down) "
      "-> (Tensor out, Tensor pre_activation)");
  library.def(
      "moe_experts_backward(Tensor grad_out, Tensor hidden_states, Tensor weights, "
      "Tensor offsets, Tensor slot_of_row, Tensor row_of_slot, Tensor gate_up, Tensor down, "
      "Tensor pre_activation, Tensor(a!) grad_gate_up, Tensor(b!) grad_down) "
      "-> (Tensor grad_hidden_states, Tensor grad_weights)");
  library.def(
      "gated_mlp_forward(Tensor hidden_states, Tensor gate_up, Tensor down) "
      "-> (Tensor out, Tensor pre_activation)");
  library.def(
      "gated_mlp_backward(Tensor grad_out, Tensor hidden_states, Tensor gate_up, Tensor down, "
      "Tensor pre_activation, Tensor(a!) grad_gate_up, Tensor(b!) grad_down) "
      "-> Tensor grad_hidden_states");
}

}  // namespace megatron_kanana
