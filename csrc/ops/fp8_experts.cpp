// torch.library schemas of the experts in fp8, which only Hopper has (fp8_experts_cuda.cpp). Rows
// that are not given quantised are quantised by the operation that takes them.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "fp8_quantize_weights(Tensor weights) -> (Tensor data, Tensor transposed, Tensor scales)");
  library.def("fp8_quantize_rows(Tensor values, bool whole) -> (Tensor data, Tensor scales)");
  library.def(
      "fp8_experts_forward(Tensor hidden_states, Tensor weights, Tensor offsets, "
      "Tensor slot_of_row, Tensor row_of_slot, Tensor gate_up, Tensor gate_up_scales, Tensor down, "
      "Tensor down_scales, bool keep_fp8, Tensor? quantized=None, Tensor? quantized_scales=None) "
      "-> (Tensor out, Tensor pre_activation, Tensor pre_activation_scales)");
  library.def(
      "fp8_experts_backward(Tensor grad_out, Tensor hidden_states, Tensor weights, "
      "Tensor offsets, Tensor slot_of_row, Tensor row_of_slot, Tensor gate_up_transposed, "
      "Tensor gate_up_scales, Tensor down_transposed, Tensor down_scales, "
      "Tensor(a!) pre_activation, Tensor pre_activation_scales, Tensor(b!) grad_gate_up, "
      "Tensor(c!) grad_down, bool fp8_weight_gradients, bool sums_are_zero, "
      "Tensor? quantized_grad_out=None, Tensor? grad_out_scales=None, Tensor? quantized=None, "
      "Tensor? quantized_scales=None) "
      "-> (Tensor grad_hidden_states, Tensor grad_weights)");
  library.def(
      "fp8_gated_mlp_forward(Tensor hidden_states, Tensor gate_up, Tensor gate_up_scales, "
      "Tensor down, Tensor down_scales, bool keep_fp8, Tensor? quantized=None, "
      "Tensor? quantized_scales=None) "
      "-> (Tensor out, Tensor pre_activation, Tensor pre_activation_scales)");
  library.def(
      "fp8_gated_mlp_backward(Tensor grad_out, Tensor hidden_states, Tensor gate_up_transposed, "
      "Tensor gate_up_scales, Tensor down_transposed, Tensor down_scales, "
      "Tensor(a!) pre_activation, Tensor pre_activation_scales, Tensor(b!) grad_gate_up, "
      "Tensor(c!) grad_down, bool fp8_weight_gradients, bool sums_are_zero, "
      "Tensor? quantized_grad_out=None, Tensor? grad_out_scales=None, Tensor? quantized=None, "
      "Tensor? quantized_scales=None) "
      "-> Tensor grad_hidden_states");
}
