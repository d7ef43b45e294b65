// The mixture of experts on Hopper GPUs by csrc/kernels. Needs no CUDA headers. Nothing here waits
// for the device.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../kernels/moe.h"
#include "cuda_stream.h"
#include "moe_checks.h"
#include "moe_cuda_sizes.h"

namespace megatron_kanana {
namespace {

RoutingSizes routing_sizes(const RouteSizes& sizes, int64_t groups, int64_t groups_of_token,
                           double scaling_factor) {
  TORCH_CHECK(sizes.slots <= kMaxExpertsOfAToken, "a token may have at most ", kMaxExpertsOfAToken,
              " experts on CUDA, got ", sizes.slots);
  TORCH_CHECK(groups <= kMaxExpertGroups, "num_groups must be at most ", kMaxExpertGroups,
              " on CUDA, got ", groups);
  return {to_int(sizes.tokens, "tokens"),    static_cast<int>(sizes.experts),
          static_cast<int>(sizes.slots),     static_cast<int>(groups),
          static_cast<int>(groups_of_token), static_cast<float>(scaling_factor)};
}

std::tuple<at::Tensor, at::Tensor> moe_route_cuda(const at::Tensor& logits,
                                                  const std::optional<at::Tensor>& expert_bias,
                                                  int64_t num_experts_per_token, int64_t num_groups,
                                                  int64_t groups_per_token, double scaling_factor) {
  const RouteSizes sizes = check_route(logits, expert_bias, num_experts_per_token, num_groups,
                                       groups_per_token, scaling_factor);
  check_experts_limit(sizes.experts);
  const auto routing = routing_sizes(sizes, num_groups, groups_per_token, scaling_factor);
  const c10::DeviceGuard guard(logits.device());
  at::Tensor weights = at::empty({sizes.tokens, sizes.slots}, logits.options());
  at::Tensor chosen = at::empty({sizes.tokens, sizes.slots}, logits.options().dtype(at::kInt));
  moe_route(routing, logits.const_data_ptr<float>(),
            expert_bias ? expert_bias->const_data_ptr<float>() : nullptr,
            weights.mutable_data_ptr<float>(), chosen.mutable_data_ptr<int32_t>(),
            current_stream(logits));
  return {weights, chosen};
}

at::Tensor moe_route_backward_cuda(const at::Tensor& grad_weights, const at::Tensor& logits,
                                   const at::Tensor& chosen, double scaling_factor) {
  const RouteSizes sizes = check_route_backward(grad_weights, logits, chosen, scaling_factor);
  check_experts_limit(sizes.experts);
  const auto routing = routing_sizes(sizes, 1, 1, scaling_factor);
  const c10::DeviceGuard guard(logits.device());
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  moe_route_backward(routing, grad_weights.const_data_ptr<float>(), logits.const_data_ptr<float>(),
                     chosen.const_data_ptr<int32_t>(), grad_logits.mutable_data_ptr<float>(),
                     current_stream(logits));
  return grad_logits;
}

void moe_count_cuda(const at::Tensor& chosen, const std::optional<at::Tensor>& padding,
                    const at::Tensor& counts) {
  const RouteSizes sizes = check_count(chosen, padding, counts);
  TORCH_CHECK(sizes.experts <= kMaxCounts, "counts may be at most ", kMaxCounts, " on CUDA, got ",
              sizes.experts);
  const auto routing = routing_sizes(sizes, 1, 1, 1.0);
  const c10::DeviceGuard guard(chosen.device());
  moe_count(routing, chosen.const_data_ptr<int32_t>(),
            padding ? padding->const_data_ptr<bool>() : nullptr, counts.mutable_data_ptr<float>(),
            current_stream(chosen));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_permutation_cuda(const at::Tensor& chosen,
                                                                    int64_t num_experts,
                                                                    int64_t num_rows) {
  const RouteSizes sizes = check_permutation(chosen, num_experts, num_rows);
  check_experts_limit(num_experts);
  const c10::DeviceGuard guard(chosen.device());
  const int64_t slots = sizes.tokens * sizes.slots;
  at::Tensor offsets = at::empty({num_experts + 1}, chosen.options());
  at::Tensor slot_of_row = at::empty({num_rows}, chosen.options());
  at::Tensor row_of_slot = at::empty(chosen.sizes(), chosen.options());
  at::Tensor workspace =
      at::empty({moe_permutation_workspace_bytes(slots, static_cast<int>(num_experts))},
                chosen.options().dtype(at::kByte));
  moe_permutation(chosen.const_data_ptr<int32_t>(), slots, static_cast<int>(num_experts), num_rows,
                  offsets.mutable_data_ptr<int32_t>(), slot_of_row.mutable_data_ptr<int32_t>(),
                  row_of_slot.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
                  current_stream(chosen));
  return {offsets, slot_of_row, row_of_slot};
}

std::tuple<at::Tensor, at::Tensor> moe_experts_forward_cuda(
    const at::Tensor& hidden_states, const at::Tensor& weights, const at::Tensor& offsets,
    const at::Tensor& slot_of_row, const at::Tensor& row_of_slot, const at::Tensor& gate_up,
    const at::Tensor& down) {
  const ExpertsSizes checked = check_experts_forward(hidden_states, weights, offsets, slot_of_row,
                                                     row_of_slot, gate_up, down);
  const ExpertSizes sizes = product_sizes(hidden_states, checked);
  const ExpertRows rows = rows_of(weights, offsets, slot_of_row, row_of_slot);
  const c10::DeviceGuard guard(hidden_states.device());
  void* const stream = current_stream(hidden_states);
  const auto options = hidden_states.options();
  at::Tensor pre_activation = at::empty({checked.rows, 2 * checked.width}, options);
  at::Tensor activation = at::empty({checked.rows, checked.width}, options);
  experts_up_forward(sizes, rows, aligned_data(hidden_states, "hidden_states"),
                     aligned_data(gate_up, "gate_up"), pre_activation.mutable_data_ptr(),
                     activation.mutable_data_ptr(), stream);
  at::Tensor out_of_rows = at::empty({checked.rows, checked.hidden}, options);
  experts_down_forward(sizes, rows, activation.const_data_ptr(), aligned_data(down, "down"),
                       out_of_rows.mutable_data_ptr(), stream);
  activation.reset();
  at::Tensor out = at::empty(hidden_states.sizes(), options);
  experts_combine(sizes, rows, out_of_rows.const_data_ptr(), rows.weights, out.mutable_data_ptr(),
                  stream);
  return {out, pre_activation};
}

std::tuple<at::Tensor, at::Tensor> moe_experts_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& weights,
    const at::Tensor& offsets, const at::Tensor& slot_of_row, const at::Tensor& row_of_slot,
    const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& pre_activation,
    const at::Tensor& grad_gate_up, const at::Tensor& grad_down) {
  const ExpertsSizes checked =
      check_experts_backward(grad_out, hidden_states, weights, offsets, slot_of_row, row_of_slot,
                             gate_up, down, pre_activation, grad_gate_up, grad_down);
  const ExpertSizes sizes = product_sizes(hidden_states, checked);
  const ExpertRows rows = rows_of(weights, offsets, slot_of_row, row_of_slot);
  const c10::DeviceGuard guard(hidden_states.device());
  void* const stream = current_stream(hidden_states);
  const auto options = hidden_states.options();
  const void* const grad_out_data = aligned_data(grad_out, "grad_out");

  // In its place: a tile is read before it is written, and nothing else reads it.
  void* const grad_pre_activation = pre_activation.mutable_data_ptr();
  at::Tensor activation = at::empty({checked.rows, checked.width}, options);
  const int parts_of_row = experts_grad_weight_parts(sizes);
  at::Tensor parts = at::empty({checked.rows, parts_of_row}, options.dtype(at::kFloat));
  experts_down_backward(sizes, rows, grad_out_data, aligned_data(down, "down"),
                        aligned_data(pre_activation, "pre_activation"), grad_pre_activation,
                        activation.mutable_data_ptr(), parts.mutable_data_ptr<float>(), stream);
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  experts_grad_weights(sizes, rows, parts.const_data_ptr<float>(), parts_of_row,
                       grad_weights.mutable_data_ptr<float>(), stream);
  experts_grad_down(sizes, rows, grad_out_data, activation.const_data_ptr(),
                    gradient_data(grad_down, "grad_down"), stream);
  activation.reset();
  experts_grad_gate_up(sizes, rows, grad_pre_activation,
                       aligned_data(hidden_states, "hidden_states"),
                       gradient_data(grad_gate_up, "grad_gate_up"), stream);
  at::Tensor grad_of_rows = at::empty({checked.rows, checked.hidden}, options);
  experts_up_backward(sizes, rows, grad_pre_activation, aligned_data(gate_up, "gate_up"),
                      grad_of_rows.mutable_data_ptr(), stream);
  at::Tensor grad_hidden_states = at::empty(hidden_states.sizes(), options);
  experts_combine(sizes, rows, grad_of_rows.const_data_ptr(), nullptr,
                  grad_hidden_states.mutable_data_ptr(), stream);
  return {grad_hidden_states, grad_weights};
}

std::tuple<at::Tensor, at::Tensor> gated_mlp_forward_cuda(const at::Tensor& hidden_states,
                                                          const at::Tensor& gate_up,
                                                          const at::Tensor& down) {
  const GatedMlpSizes checked = check_gated_mlp_forward(hidden_states, gate_up, down);
  const ExpertSizes sizes = product_sizes(hidden_states, checked);
  const c10::DeviceGuard guard(hidden_states.device());
  void* const stream = current_stream(hidden_states);
  const auto options = hidden_states.options();
  at::Tensor pre_activation = at::empty({checked.tokens, 2 * checked.width}, options);
  at::Tensor activation = at::empty({checked.tokens, checked.width}, options);
  experts_up_forward(sizes, {}, aligned_data(hidden_states, "hidden_states"),
                     aligned_data(gate_up, "gate_up"), pre_activation.mutable_data_ptr(),
                     activation.mutable_data_ptr(), stream);
  at::Tensor out = at::empty(hidden_states.sizes(), options);
  experts_down_forward(sizes, {}, activation.const_data_ptr(), aligned_data(down, "down"),
                       out.mutable_data_ptr(), stream);
  return {out, pre_activation};
}

at::Tensor gated_mlp_backward_cuda(const at::Tensor& grad_out, const at::Tensor& hidden_states,
                                   const at::Tensor& gate_up, const at::Tensor& down,
                                   const at::Tensor& pre_activation, const at::Tensor& grad_gate_up,
                                   const at::Tensor& grad_down) {
  const GatedMlpSizes checked = check_gated_mlp_backward(grad_out, hidden_states, gate_up, down,
                                                         pre_activation, grad_gate_up, grad_down);
  const ExpertSizes sizes = product_sizes(hidden_states, checked);
  const c10::DeviceGuard guard(hidden_states.device());
  void* const stream = current_stream(hidden_states);
  const auto options = hidden_states.options();
  const void* const grad_out_data = aligned_data(grad_out, "grad_out");
  // In its place: a tile is read before it is written, and nothing else reads it.
  void* const grad_pre_activation = pre_activation.mutable_data_ptr();
  at::Tensor activation = at::empty({checked.tokens, checked.width}, options);
  experts_down_backward(sizes, {}, grad_out_data, aligned_data(down, "down"),
                        aligned_data(pre_activation, "pre_activation"), grad_pre_activation,
                        activation.mutable_data_ptr(), nullptr, stream);
  experts_grad_down(sizes, {}, grad_out_data, activation.const_data_ptr(),
                    gradient_data(grad_down, "grad_down"), stream);
  activation.reset();
  experts_grad_gate_up(sizes, {}, grad_pre_activation, aligned_data(hidden_states, "hidden_states"),
                       gradient_data(grad_gate_up, "grad_gate_up"), stream);
  at::Tensor grad_hidden_states = at::empty(hidden_states.sizes(), options);
  experts_up_backward(sizes, {}, grad_pre_activation, aligned_data(gate_up, "gate_up"),
                      grad_hidden_states.mutable_data_ptr(), stream);
  return grad_hidden_states;
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("moe_route", moe_route_cuda);
  library.impl("moe_route_backward", moe_route_backward_cuda);
  library.impl("moe_count", moe_count_cuda);
  library.impl("moe_permutation", moe_permutation_cuda);
  library.impl("moe_experts_forward", moe_experts_forward_cuda);
  library.impl("moe_experts_backward", moe_experts_backward_cuda);
  library.impl("gated_mlp_forward", gated_mlp_forward_cuda);
  library.impl("gated_mlp_backward", gated_mlp_backward_cuda);
}

}  // namespace megatron_kanana
