// torch.library schemas of the mixture of experts, and its implementation on a CPU by csrc/cpu.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/moe_experts.h"
#include "../cpu/moe_routing.h"
#include "moe_checks.h"
#include "pieces.h"
#include "workspace.h"

namespace megatron_kanana {
namespace {

// Numbers outside of [least, end) would be read or written outside of memory.
void check_numbers(const at::Tensor& tensor, const char* name, int64_t least, int64_t end) {
  const int32_t* const numbers = tensor.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    TORCH_CHECK(numbers[i] >= least && numbers[i] < end, name, " must have numbers from ", least,
                " to ", end - 1, ", got ", numbers[i], " at place ", i);
  }
}

std::tuple<at::Tensor, at::Tensor> moe_route(const at::Tensor& logits,
                                             const std::optional<at::Tensor>& expert_bias,
                                             int64_t num_experts_per_token, int64_t num_groups,
                                             int64_t groups_per_token, double scaling_factor) {
  const RouteSizes sizes = check_route(logits, expert_bias, num_experts_per_token, num_groups,
                                       groups_per_token, scaling_factor);
  const cpu::RoutingProblem problem = {sizes.tokens,     sizes.experts,
                                       sizes.slots,      num_groups,
                                       groups_per_token, static_cast<float>(scaling_factor)};
  at::Tensor weights = at::empty({sizes.tokens, sizes.slots}, logits.options());
  at::Tensor chosen = at::empty({sizes.tokens, sizes.slots}, logits.options().dtype(at::kInt));
  const float* const bias = expert_bias ? expert_bias->const_data_ptr<float>() : nullptr;
  for_each_piece(problem.pieces(), cpu::routing_scratch(problem),
                 [&](int64_t piece, float* scratch) {
                   cpu::route_piece(problem, logits.const_data_ptr<float>(), bias,
                                    weights.mutable_data_ptr<float>(),
                                    chosen.mutable_data_ptr<int32_t>(), piece, scratch);
                 });
  return {weights, chosen};
}

at::Tensor moe_route_backward(const at::Tensor& grad_weights, const at::Tensor& logits,
                              const at::Tensor& chosen, double scaling_factor) {
  const RouteSizes sizes = check_route_backward(grad_weights, logits, chosen, scaling_factor);
  check_numbers(chosen, "experts", 0, sizes.experts);
  const cpu::RoutingProblem problem = {
      sizes.tokens, sizes.experts, sizes.slots, 1, 1, static_cast<float>(scaling_factor)};
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  for_each_piece(
      problem.pieces(), cpu::routing_scratch(problem), [&](int64_t piece, float* scratch) {
        cpu::route_backward_piece(problem, grad_weights.const_data_ptr<float>(),
                                  logits.const_data_ptr<float>(), chosen.const_data_ptr<int32_t>(),
                                  grad_logits.mutable_data_ptr<float>(), piece, scratch);
      });
  return grad_logits;
}

void moe_count(const at::Tensor& chosen, const std::optional<at::Tensor>& padding,
               const at::Tensor& counts) {
  const RouteSizes sizes = check_count(chosen, padding, counts);
  check_numbers(chosen, "experts", 0, sizes.experts);
  cpu::count_tokens(chosen.const_data_ptr<int32_t>(), sizes.tokens, sizes.slots,
                    padding ? padding->const_data_ptr<bool>() : nullptr, sizes.experts,
                    counts.mutable_data_ptr<float>());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_permutation(const at::Tensor& chosen,
                                                               int64_t num_experts,
                                                               int64_t num_rows) {
  const RouteSizes sizes = check_permutation(chosen, num_experts, num_rows);
  check_numbers(chosen, "experts", -1, num_experts);
  const int32_t* const numbers = chosen.const_data_ptr<int32_t>();
  const int64_t elsewhere = std::count(numbers, numbers + chosen.numel(), -1);
  TORCH_CHECK(num_rows == chosen.numel() - elsewhere,
              "num_rows must be the number of slots that are not -1, ", chosen.numel() - elsewhere,
              ", got ", num_rows);
  at::Tensor offsets = at::empty({num_experts + 1}, chosen.options());
  at::Tensor slot_of_row = at::empty({num_rows}, chosen.options());
  at::Tensor row_of_slot = at::empty({sizes.tokens, sizes.slots}, chosen.options());
  cpu::permute(numbers, chosen.numel(), num_experts, offsets.mutable_data_ptr<int32_t>(),
               slot_of_row.mutable_data_ptr<int32_t>(), row_of_slot.mutable_data_ptr<int32_t>());
  return {offsets, slot_of_row, row_of_slot};
}

void check_permutation_numbers(const ExpertsSizes& sizes, const at::Tensor& offsets,
                               const at::Tensor& slot_of_row, const at::Tensor& row_of_slot) {
  const int32_t* const begins = offsets.const_data_ptr<int32_t>();
  for (int64_t expert = 0; expert < sizes.experts; ++expert) {
    TORCH_CHECK(begins[expert] <= begins[expert + 1], "offsets must not fall, got ",
                begins[expert + 1], " after ", begins[expert]);
  }
  TORCH_CHECK(begins[0] == 0 && begins[sizes.experts] == sizes.rows, "offsets must go from 0 to ",
              sizes.rows, ", got ", begins[0], " and ", begins[sizes.experts]);
  check_numbers(slot_of_row, "slot_of_row", 0, sizes.tokens * sizes.slots);
  check_numbers(row_of_slot, "row_of_slot", -1, sizes.rows);
}

cpu::Dtype dtype_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? cpu::Dtype::kFloat32 : cpu::Dtype::kBfloat16;
}

// Floats of a wave: 64 MiB.
constexpr int64_t kWaveFloats = 16 << 20;

// What both networks compute, with an empty list of slots where every token visits the one expert.
struct ExpertsArguments {
  cpu::ExpertsProblem problem;
  cpu::RowLayout layout;
  cpu::ExpertWeights expert_weights;
};

cpu::Panels pack(const ExpertsArguments& arguments, const cpu::Wave& wave, bool transposed,
                 float* data) {
  const cpu::Panels panels = {data, transposed, wave.first_used_expert};
  for_each_piece(cpu::pack_pieces(arguments.problem, wave), 0, [&](int64_t piece, float*) {
    cpu::pack_piece(arguments.problem, arguments.layout, arguments.expert_weights, panels, piece);
  });
  return panels;
}

// The most floats that any wave takes.
int64_t floats_of_waves(const std::vector<cpu::Wave>& waves, int64_t floats_of_row,
                        int64_t floats_of_expert) {
  int64_t most = 0;
  for (const cpu::Wave& wave : waves) {
    most = std::max(most, (wave.end_padded_row - wave.first_padded_row) * floats_of_row +
                              (wave.end_used_expert - wave.first_used_expert) * floats_of_expert);
  }
  return most;
}

void combine(const ExpertsArguments& arguments, const float* rows, const float* weights,
             const at::Tensor& out) {
  const cpu::ExpertsProblem& problem = arguments.problem;
  for_each_piece(cpu::combine_pieces(problem), cpu::experts_scratch(problem),
                 [&](int64_t piece, float* scratch) {
                   cpu::combine_piece(problem, arguments.layout, rows, weights,
                                      out.mutable_data_ptr(), piece, scratch);
                 });
}

std::tuple<at::Tensor, at::Tensor> forward(const ExpertsArguments& arguments, int64_t rows,
                                           const at::Tensor& hidden_states, const float* weights) {
  const auto& [problem, layout, expert_weights] = arguments;
  at::Tensor out = at::empty(hidden_states.sizes(), hidden_states.options());
  at::Tensor pre_activation = at::empty({rows, 2 * problem.width}, hidden_states.options());
  const int64_t floats_of_expert = cpu::Panels{nullptr, true, 0}.floats_of_expert(problem);
  const auto waves = layout.waves(0, floats_of_expert, kWaveFloats);
  const int64_t out_floats = layout.padded_rows * problem.hidden_stride();
  const int64_t wave_floats = floats_of_waves(waves, 0, floats_of_expert);
  Workspace workspace(out_floats + wave_floats);
  const cpu::ForwardRows forward_rows = {hidden_states.const_data_ptr(),
                                         pre_activation.mutable_data_ptr(),
                                         workspace.take(out_floats)};
  float* const panel_data = workspace.take(wave_floats);
  for (const cpu::Wave& wave : waves) {
    const cpu::Panels panels = pack(arguments, wave, true, panel_data);
    for_each_piece(wave.end_block - wave.first_block, cpu::experts_scratch(problem),
                   [&](int64_t piece, float* scratch) {
                     cpu::experts_forward_block(problem, layout.blocks[wave.first_block + piece],
                                                panels, forward_rows, scratch);
                   });
  }
  combine(arguments, forward_rows.out_rows, weights, out);
  return {out, pre_activation};
}

at::Tensor backward(const ExpertsArguments& arguments, const at::Tensor& grad_out,
                    const at::Tensor& hidden_states, const at::Tensor& pre_activation,
                    const float* weights, float* grad_weights, const at::Tensor& grad_gate_up,
                    const at::Tensor& grad_down) {
  const auto& [problem, layout, expert_weights] = arguments;
  const int64_t floats_of_row = cpu::BackwardRows::floats_of_row(problem);
  const int64_t floats_of_expert = cpu::Panels{nullptr, false, 0}.floats_of_expert(problem);
  const auto waves = layout.waves(floats_of_row, floats_of_expert, kWaveFloats);
  const int64_t grad_hidden_floats = layout.padded_rows * problem.hidden_stride();
  const int64_t wave_floats = floats_of_waves(waves, floats_of_row, floats_of_expert);
  Workspace workspace(grad_hidden_floats + wave_floats);
  float* const grad_hidden_rows = workspace.take(grad_hidden_floats);
  float* const wave_data = workspace.take(wave_floats);
  const cpu::WeightGradients gradients = {grad_gate_up.mutable_data_ptr<float>(),
                                          grad_down.mutable_data_ptr<float>()};
  const int64_t scratch_floats = cpu::experts_scratch(problem);
  for (const cpu::Wave& wave : waves) {
    const int64_t rows = wave.end_padded_row - wave.first_padded_row;
    float* const hidden_rows = wave_data + rows * problem.hidden_stride();
    float* const grad_pre_rows = hidden_rows + rows * problem.hidden_stride();
    float* const activation_rows = grad_pre_rows + rows * problem.gate_up_stride();
    const cpu::BackwardRows backward_rows = {grad_out.const_data_ptr(),
                                             hidden_states.const_data_ptr(),
                                             pre_activation.const_data_ptr(),
                                             weights,
                                             grad_weights,
                                             grad_hidden_rows,
                                             wave.first_padded_row,
                                             wave_data,
                                             hidden_rows,
                                             grad_pre_rows,
                                             activation_rows};
    const cpu::Panels panels = pack(arguments, wave, false, wave_data + rows * floats_of_row);
    for_each_piece(wave.end_block - wave.first_block, scratch_floats,
                   [&](int64_t piece, float* scratch) {
                     cpu::experts_backward_block(problem, layout.blocks[wave.first_block + piece],
                                                 panels, backward_rows, scratch);
                   });
    for_each_piece(cpu::weight_gradient_pieces(problem, wave), scratch_floats,
                   [&](int64_t piece, float* scratch) {
                     cpu::weight_gradient_piece(problem, layout, wave, backward_rows, gradients,
                                                piece, scratch);
                   });
  }
  at::Tensor grad_hidden_states = at::empty(hidden_states.sizes(), hidden_states.options());
  combine(arguments, grad_hidden_rows, nullptr, grad_hidden_states);
  return grad_hidden_states;
}

ExpertsArguments routed_arguments(const ExpertsSizes& sizes, const at::Tensor& offsets,
                                  const at::Tensor& slot_of_row, const at::Tensor& row_of_slot,
                                  const at::Tensor& gate_up, const at::Tensor& down) {
  check_permutation_numbers(sizes, offsets, slot_of_row, row_of_slot);
  return {{sizes.tokens, sizes.slots, sizes.experts, sizes.hidden, sizes.width, dtype_of(down),
           slot_of_row.const_data_ptr<int32_t>(), row_of_slot.const_data_ptr<int32_t>()},
          cpu::RowLayout(offsets.const_data_ptr<int32_t>(), sizes.experts),
          {gate_up.const_data_ptr(), down.const_data_ptr()}};
}

std::tuple<at::Tensor, at::Tensor> moe_experts_forward(
    const at::Tensor& hidden_states, const at::Tensor& weights, const at::Tensor& offsets,
    const at::Tensor& slot_of_row, const at::Tensor& row_of_slot, const at::Tensor& gate_up,
    const at::Tensor& down) {
  const ExpertsSizes sizes = check_experts_forward(hidden_states, weights, offsets, slot_of_row,
                                                   row_of_slot, gate_up, down);
  return forward(routed_arguments(sizes, offsets, slot_of_row, row_of_slot, gate_up, down),
                 sizes.rows, hidden_states, weights.const_data_ptr<float>());
}

std::tuple<at::Tensor, at::Tensor> moe_experts_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& weights,
    const at::Tensor& offsets, const at::Tensor& slot_of_row, const at::Tensor& row_of_slot,
    const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& pre_activation,
    const at::Tensor& grad_gate_up, const at::Tensor& grad_down) {
  const ExpertsSizes sizes =
      check_experts_backward(grad_out, hidden_states, weights, offsets, slot_of_row, row_of_slot,
                             gate_up, down, pre_activation, grad_gate_up, grad_down);
  const auto arguments = routed_arguments(sizes, offsets, slot_of_row, row_of_slot, gate_up, down);
  at::Tensor grad_weights = at::zeros(weights.sizes(), weights.options());
  at::Tensor grad_hidden_states =
      backward(arguments, grad_out, hidden_states, pre_activation, weights.const_data_ptr<float>(),
               grad_weights.mutable_data_ptr<float>(), grad_gate_up, grad_down);
  return {grad_hidden_states, grad_weights};
}

ExpertsArguments dense_arguments(const GatedMlpSizes& sizes, const at::Tensor& gate_up,
                                 const at::Tensor& down) {
  const int32_t offsets[] = {0, static_cast<int32_t>(sizes.tokens)};
  return {{sizes.tokens, 1, 1, sizes.hidden, sizes.width, dtype_of(down), nullptr, nullptr},
          cpu::RowLayout(offsets, 1),
          {gate_up.const_data_ptr(), down.const_data_ptr()}};
}

std::tuple<at::Tensor, at::Tensor> gated_mlp_forward(const at::Tensor& hidden_states,
                                                     const at::Tensor& gate_up,
                                                     const at::Tensor& down) {
  const GatedMlpSizes sizes = check_gated_mlp_forward(hidden_states, gate_up, down);
  return forward(dense_arguments(sizes, gate_up, down), sizes.tokens, hidden_states, nullptr);
}

at::Tensor gated_mlp_backward(const at::Tensor& grad_out, const at::Tensor& hidden_states,
                              const at::Tensor& gate_up, const at::Tensor& down,
                              const at::Tensor& pre_activation, const at::Tensor& grad_gate_up,
                              const at::Tensor& grad_down) {
  const GatedMlpSizes sizes = check_gated_mlp_backward(grad_out, hidden_states, gate_up, down,
                                                       pre_activation, grad_gate_up, grad_down);
  return backward(dense_arguments(sizes, gate_up, down), grad_out, hidden_states, pre_activation,
                  nullptr, nullptr, grad_gate_up, grad_down);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "moe_route(Tensor logits, Tensor? expert_bias, int num_experts_per_token, int num_groups, "
      "int groups_per_token, float scaling_factor) -> (Tensor weights, Tensor experts)");
  library.def(
      "moe_route_backward(Tensor grad_weights, Tensor logits, Tensor experts, "
      "float scaling_factor) -> Tensor grad_logits");
  library.def("moe_count(Tensor experts, Tensor? padding, Tensor(a!) counts) -> ()");
  library.def(
      "moe_permutation(Tensor experts, int num_experts, SymInt num_rows) "
      "-> (Tensor offsets, Tensor slot_of_row, Tensor row_of_slot)");
  library.def(
      "moe_experts_forward(Tensor hidden_states, Tensor weights, Tensor offsets, "
      "Tensor slot_of_row, Tensor row_of_slot, Tensor gate_up, Tensor down) "
      "-> (Tensor out, Tensor pre_activation)");
  library.def(
      "moe_experts_backward(Tensor grad_out, Tensor hidden_states, Tensor weights, "
      "Tensor offsets, Tensor slot_of_row, Tensor row_of_slot, Tensor gate_up, Tensor down, "
      "Tensor(a!) pre_activation, Tensor(b!) grad_gate_up, Tensor(c!) grad_down) "
      "-> (Tensor grad_hidden_states, Tensor grad_weights)");
  library.def(
      "gated_mlp_forward(Tensor hidden_states, Tensor gate_up, Tensor down) "
      "-> (Tensor out, Tensor pre_activation)");
  library.def(
      "gated_mlp_backward(Tensor grad_out, Tensor hidden_states, Tensor gate_up, Tensor down, "
      "Tensor(a!) pre_activation, Tensor(b!) grad_gate_up, Tensor(c!) grad_down) "
      "-> Tensor grad_hidden_states");
}

TORCH_LIBRARY_IMPL(megatron_kanana, CPU, library) {
  library.impl("moe_route", moe_route);
  library.impl("moe_route_backward", moe_route_backward);
  library.impl("moe_count", moe_count);
  library.impl("moe_permutation", moe_permutation);
  library.impl("moe_experts_forward", moe_experts_forward);
  library.impl("moe_experts_backward", moe_experts_backward);
  library.impl("gated_mlp_forward", gated_mlp_forward);
  library.impl("gated_mlp_backward", gated_mlp_backward);
}

}  // namespace megatron_kanana
