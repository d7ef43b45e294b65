// The experts in fp8 on Hopper GPUs by csrc/kernels. Needs no CUDA headers. Nothing here waits for
// the device.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../kernels/fp8_experts.h"
#include "cuda_stream.h"
#include "moe_checks.h"
#include "moe_cuda_sizes.h"

namespace megatron_kanana {
namespace {

constexpr auto kFp8 = at::kFloat8_e4m3fn;

// 8-bit numbers and the scales of their blocks.
struct Quantized {
  at::Tensor data, scales;

  static Quantized empty(int64_t rows, int64_t width, const at::TensorOptions& options) {
    return {at::empty({rows, width}, options.dtype(kFp8)),
            at::empty({rows, width / kFp8WidthUnit}, options.dtype(at::kFloat))};
  }
  Fp8Rows rows() const { return {data.const_data_ptr(), scales.const_data_ptr<float>()}; }
  Fp8Weights weights() const { return {data.const_data_ptr(), scales.const_data_ptr<float>()}; }
};

struct QuantizedExperts {
  Quantized gate_up, down;
};

void check_unit(int64_t size, const char* name) {
  TORCH_CHECK(size % kFp8WidthUnit == 0, name, " must be a multiple of ", kFp8WidthUnit,
              " in fp8, got ", size);
}

// Weights [experts, rows, columns], or with `transposed` [experts, columns, rows]; scales are of
// the former.
Quantized check_weights(const at::Tensor& data, const at::Tensor& scales, const char* name,
                        int64_t experts, int64_t rows, int64_t columns, bool transposed,
                        const at::Tensor& hidden_states) {
  check_moe_tensor(data, name, {experts, transposed ? columns : rows, transposed ? rows : columns},
                   kFp8, hidden_states, "hidden_states");
  check_moe_tensor(scales, "scales", {experts, rows / kFp8WidthUnit, columns / kFp8WidthUnit},
                   at::kFloat, hidden_states, "hidden_states");
  return {data, scales};
}

QuantizedExperts check_experts(const at::Tensor& gate_up, const at::Tensor& gate_up_scales,
                               const at::Tensor& down, const at::Tensor& down_scales,
                               const ExpertSizes& sizes, bool transposed,
                               const at::Tensor& hidden_states) {
  check_unit(sizes.hidden_size, "hidden size");
  check_unit(sizes.width, "width");
  return {check_weights(gate_up, gate_up_scales, "gate_up", sizes.experts, 2 * sizes.width,
                        sizes.hidden_size, transposed, hidden_states),
          check_weights(down, down_scales, "down", sizes.experts, sizes.hidden_size, sizes.width,
                        transposed, hidden_states)};
}

// Experts and width that gate_up tells of.
std::tuple<int64_t, int64_t> experts_and_width(const at::Tensor& gate_up, bool transposed) {
  check_moe_dimensions(
      gate_up, "gate_up", 3,
      transposed ? "[experts, hidden size, 2 * width]" : "[experts, 2 * width, hidden size]");
  TORCH_CHECK(gate_up.numel() > 0, "gate_up must not be empty, got shape ", gate_up.sizes());
  return {gate_up.size(0), gate_up.size(transposed ? 2 : 1) / 2};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fp8_quantize_weights_cuda(
    const at::Tensor& weights) {
  check_moe_dimensions(weights, "weights", 3, "[experts, rows, columns]");
  check_moe_tensor(weights, "weights", weights.sizes(), at::kBFloat16, weights, "weights");
  const int64_t experts = weights.size(0), rows = weights.size(1), columns = weights.size(2);
  check_unit(rows, "rows of weights");
  check_unit(columns, "columns of weights");
  const c10::DeviceGuard guard(weights.device());
  const auto options = weights.options();
  at::Tensor data = at::empty(weights.sizes(), options.dtype(kFp8));
  at::Tensor transposed = at::empty({experts, columns, rows}, options.dtype(kFp8));
  at::Tensor scales = at::empty({experts, rows / kFp8WidthUnit, columns / kFp8WidthUnit},
                                options.dtype(at::kFloat));
  fp8_quantize_weights(aligned_data(weights, "weights"), to_int(experts, "experts"),
                       to_int(rows, "rows"), to_int(columns, "columns"), data.mutable_data_ptr(),
                       transposed.mutable_data_ptr(), scales.mutable_data_ptr<float>(),
                       current_stream(weights));
  return {data, transposed, scales};
}

// In blocks, or with `quantize` = fp8_quantize_whole_rows each row with one scale.
Quantized quantize_rows(const at::Tensor& values, const char* name, void* stream,
                        decltype(fp8_quantize_rows)* quantize = fp8_quantize_rows) {
  Quantized quantized = Quantized::empty(values.size(0), values.size(1), values.options());
  quantize(aligned_data(values, name), values.size(0), to_int(values.size(1), "width"),
           quantized.data.mutable_data_ptr(), quantized.scales.mutable_data_ptr<float>(), stream);
  return quantized;
}

std::tuple<at::Tensor, at::Tensor> fp8_quantize_rows_cuda(const at::Tensor& values, bool whole) {
  check_moe_dimensions(values, "values", 2, "[rows, width]");
  check_moe_tensor(values, "values", values.sizes(), at::kBFloat16, values, "values");
  check_unit(values.size(1), "width of rows");
  const c10::DeviceGuard guard(values.device());
  auto [data, scales] = quantize_rows(values, "values", current_stream(values),
                                      whole ? fp8_quantize_whole_rows : fp8_quantize_rows);
  return {data, scales};
}

// Rows that the caller has quantised, or none.
struct GivenRows {
  const std::optional<at::Tensor>& data;
  const std::optional<at::Tensor>& scales;

  Quantized or_quantized(const at::Tensor& values, const char* name, void* stream,
                         decltype(fp8_quantize_rows)* quantize = fp8_quantize_rows) const {
    if (!data.has_value()) return quantize_rows(values, name, stream, quantize);
    aligned_data(values, name);
    TORCH_CHECK(scales.has_value(), name, " that is quantised must have scales");
    check_moe_tensor(*data, name, values.sizes(), kFp8, values, name);
    check_moe_tensor(*scales, "scales", {values.size(0), values.size(1) / kFp8WidthUnit},
                     at::kFloat, values, name);
    aligned_data(*data, name);
    return {*data, *scales};
  }
};

// The pre-activation, in bf16 or quantised; without scales in the former case.
struct Kept {
  at::Tensor data, scales;

  static Kept empty(int64_t rows, int64_t width, bool in_fp8, const at::TensorOptions& options) {
    if (in_fp8) {
      auto [data, scales] = Quantized::empty(rows, width, options);
      return {data, scales};
    }
    return {at::empty({rows, width}, options), at::empty({0}, options.dtype(at::kFloat))};
  }
  bool in_fp8() const { return data.scalar_type() == kFp8; }
  KeptPreActivation pre_activation() const {
    return {data.mutable_data_ptr(), in_fp8() ? scales.mutable_data_ptr<float>() : nullptr};
  }
};

struct Pass {
  ExpertSizes sizes;
  ExpertRows rows;
  void* stream;
};

// The experts' outputs [rows, hidden size], and the pre-activation.
std::tuple<at::Tensor, Kept> forward_products(const Pass& pass, const at::Tensor& hidden_states,
                                              const GivenRows& given,
                                              const QuantizedExperts& experts, bool keep_fp8) {
  const int64_t rows = pass.sizes.rows, width = pass.sizes.width;
  const auto options = hidden_states.options();
  const Quantized inputs = given.or_quantized(hidden_states, "hidden_states", pass.stream);
  const Kept kept = Kept::empty(rows, 2 * width, keep_fp8, options);
  Quantized activation = Quantized::empty(rows, width, options);
  fp8_experts_up_forward(pass.sizes, pass.rows, inputs.rows(), experts.gate_up.weights(),
                         kept.pre_activation(), activation.data.mutable_data_ptr(),
                         activation.scales.mutable_data_ptr<float>(), pass.stream);
  at::Tensor out_of_rows = at::empty({rows, pass.sizes.hidden_size}, options);
  fp8_experts_down_forward(pass.sizes, pass.rows, activation.rows(), experts.down.weights(),
                           out_of_rows.mutable_data_ptr(), pass.stream);
  return {out_of_rows, kept};
}

struct Gradients {
  const at::Tensor &gate_up, &down;  // fp32, added to
  float* weight_parts;               // of the routing weights, or null
  bool in_fp8;                       // those of the weights
  bool sums_are_zero;

  float* gate_up_sums() const { return gradient_data(gate_up, "grad_gate_up"); }
  float* down_sums() const { return gradient_data(down, "grad_down"); }
};

struct Columns {
  at::Tensor data, scales;

  static Columns empty(const ExpertSizes& sizes, int64_t width, const at::TensorOptions& options) {
    const int64_t tiles = fp8_column_tiles(sizes);
    return {at::empty({tiles, width, kFp8ColumnTileRows}, options.dtype(kFp8)),
            at::empty({tiles, width / kFp8WidthUnit}, options.dtype(at::kFloat))};
  }
  Fp8Columns columns() const { return {data.mutable_data_ptr(), scales.mutable_data_ptr<float>()}; }
};

struct Backward {
  const Pass& pass;
  const at::Tensor &grad_out, &hidden_states;
  GivenRows given_grad_out, given_hidden_states;
  const QuantizedExperts& experts;
  const Kept& kept;
  const Gradients& gradients;
};

// Adds the weights' gradients, products of bf16, and returns the pre-activation's. That of a
// pre-activation in bf16 takes its place: a tile is read before it is written, and nothing else
// reads it.
Quantized weight_gradients_in_bf16(const Backward& backward) {
  const auto& [pass, grad_out, hidden_states, given_grad_out, given_hidden_states, experts, kept,
               gradients] = backward;
  const int64_t rows = pass.sizes.rows, width = pass.sizes.width;
  const auto options = hidden_states.options();
  at::Tensor grad_pre_activation =
      kept.in_fp8() ? at::empty({rows, 2 * width}, options) : kept.data;
  at::Tensor activation = at::empty({rows, width}, options);
  Quantized grad = Quantized::empty(rows, 2 * width, options);
  {
    const Quantized grad_outs = given_grad_out.or_quantized(grad_out, "grad_out", pass.stream);
    fp8_experts_down_backward(pass.sizes, pass.rows, grad_outs.rows(), experts.down.weights(),
                              kept.pre_activation(), grad_pre_activation.mutable_data_ptr(),
                              grad.data.mutable_data_ptr(), grad.scales.mutable_data_ptr<float>(),
                              activation.mutable_data_ptr(), gradients.weight_parts, pass.stream);
  }
  experts_grad_down(pass.sizes, pass.rows, grad_out.const_data_ptr(), activation.const_data_ptr(),
                    gradients.down_sums(), pass.stream);
  activation.reset();
  experts_grad_gate_up(pass.sizes, pass.rows, grad_pre_activation.const_data_ptr(),
                       aligned_data(hidden_states, "hidden_states"), gradients.gate_up_sums(),
                       pass.stream);
  return grad;
}

// The same with the weights' gradients in fp8.
Quantized weight_gradients_in_fp8(const Backward& backward) {
  const auto& [pass, grad_out, hidden_states, given_grad_out, given_hidden_states, experts, kept,
               gradients] = backward;
  const int64_t rows = pass.sizes.rows, width = pass.sizes.width;
  const auto options = hidden_states.options();
  Quantized grad = Quantized::empty(rows, 2 * width, options);
  const Columns columns = Columns::empty(pass.sizes, 2 * width, options);
  const Quantized inputs = given_hidden_states.or_quantized(hidden_states, "hidden_states",
                                                            pass.stream, fp8_quantize_whole_rows);
  {
    const Columns activation = Columns::empty(pass.sizes, width, options);
    const Quantized grad_outs =
        given_grad_out.or_quantized(grad_out, "grad_out", pass.stream, fp8_quantize_whole_rows);
    fp8_experts_down_backward(pass.sizes, pass.rows, grad_outs.rows(), experts.down.weights(),
                              kept.pre_activation(), inputs.scales.const_data_ptr<float>(),
                              grad.data.mutable_data_ptr(), grad.scales.mutable_data_ptr<float>(),
                              columns.columns(), activation.columns(), gradients.weight_parts,
                              pass.stream);
    fp8_experts_grad_down(pass.sizes, pass.rows, grad_outs.data.const_data_ptr(),
                          activation.columns(), gradients.down_sums(), gradients.sums_are_zero,
                          pass.stream);
  }
  fp8_experts_grad_gate_up(pass.sizes, pass.rows, columns.columns(), inputs.data.const_data_ptr(),
                           gradients.gate_up_sums(), gradients.sums_are_zero, pass.stream);
  return grad;
}

// The gradient of the experts' inputs, [rows, hidden size].
at::Tensor backward_products(const Backward& backward) {
  const Pass& pass = backward.pass;
  const Quantized grad = backward.gradients.in_fp8 ? weight_gradients_in_fp8(backward)
                                                   : weight_gradients_in_bf16(backward);
  at::Tensor grad_of_rows =
      at::empty({pass.sizes.rows, pass.sizes.hidden_size}, backward.hidden_states.options());
  fp8_experts_up_backward(pass.sizes, pass.rows, grad.rows(), backward.experts.gate_up.weights(),
                          grad_of_rows.mutable_data_ptr(), pass.stream);
  return grad_of_rows;
}

// What a backward pass takes beside what its forward pass took.
void check_backward(const at::Tensor& grad_out, const at::Tensor& hidden_states,
                    const ExpertSizes& sizes, const Kept& kept, at::IntArrayRef of_gate_up,
                    const at::Tensor& grad_gate_up, at::IntArrayRef of_down,
                    const at::Tensor& grad_down) {
  const auto check = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                         at::ScalarType wanted) {
    check_moe_tensor(tensor, name, shape, wanted, hidden_states, "hidden_states");
  };
  check(grad_out, "grad_out", hidden_states.sizes(), at::kBFloat16);
  const int64_t width = 2 * sizes.width;
  check(kept.data, "pre_activation", {sizes.rows, width}, kept.in_fp8() ? kFp8 : at::kBFloat16);
  aligned_data(kept.data, "pre_activation");
  if (kept.in_fp8()) {
    check(kept.scales, "pre_activation_scales", {sizes.rows, width / kFp8WidthUnit}, at::kFloat);
  }
  check(grad_gate_up, "grad_gate_up", of_gate_up, at::kFloat);
  check(grad_down, "grad_down", of_down, at::kFloat);
}

Pass routed_pass(const at::Tensor& hidden_states, const at::Tensor& weights,
                 const at::Tensor& offsets, const at::Tensor& slot_of_row,
                 const at::Tensor& row_of_slot, const at::Tensor& gate_up, bool transposed) {
  const auto [experts, width] = experts_and_width(gate_up, transposed);
  const ExpertsSizes checked =
      check_expert_rows(hidden_states, weights, offsets, slot_of_row, row_of_slot, experts, width);
  return {product_sizes(hidden_states, checked),
          rows_of(weights, offsets, slot_of_row, row_of_slot), current_stream(hidden_states)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fp8_experts_forward_cuda(
    const at::Tensor& hidden_states, const at::Tensor& weights, const at::Tensor& offsets,
    const at::Tensor& slot_of_row, const at::Tensor& row_of_slot, const at::Tensor& gate_up,
    const at::Tensor& gate_up_scales, const at::Tensor& down, const at::Tensor& down_scales,
    bool keep_fp8, const std::optional<at::Tensor>& quantized,
    const std::optional<at::Tensor>& quantized_scales) {
  const Pass pass =
      routed_pass(hidden_states, weights, offsets, slot_of_row, row_of_slot, gate_up, false);
  const QuantizedExperts experts =
      check_experts(gate_up, gate_up_scales, down, down_scales, pass.sizes, false, hidden_states);
  const c10::DeviceGuard guard(hidden_states.device());
  const auto [out_of_rows, kept] =
      forward_products(pass, hidden_states, {quantized, quantized_scales}, experts, keep_fp8);
  at::Tensor out = at::empty(hidden_states.sizes(), hidden_states.options());
  experts_combine(pass.sizes, pass.rows, out_of_rows.const_data_ptr(), pass.rows.weights,
                  out.mutable_data_ptr(), pass.stream);
  return {out, kept.data, kept.scales};
}

std::tuple<at::Tensor, at::Tensor> fp8_experts_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& weights,
    const at::Tensor& offsets, const at::Tensor& slot_of_row, const at::Tensor& row_of_slot,
    const at::Tensor& gate_up_transposed, const at::Tensor& gate_up_scales,
    const at::Tensor& down_transposed, const at::Tensor& down_scales,
    const at::Tensor& pre_activation, const at::Tensor& pre_activation_scales,
    const at::Tensor& grad_gate_up, const at::Tensor& grad_down, bool fp8_weight_gradients,
    bool sums_are_zero, const std::optional<at::Tensor>& quantized_grad_out,
    const std::optional<at::Tensor>& grad_out_scales, const std::optional<at::Tensor>& quantized,
    const std::optional<at::Tensor>& quantized_scales) {
  const Pass pass = routed_pass(hidden_states, weights, offsets, slot_of_row, row_of_slot,
                                gate_up_transposed, true);
  const ExpertSizes& sizes = pass.sizes;
  const QuantizedExperts experts = check_experts(
      gate_up_transposed, gate_up_scales, down_transposed, down_scales, sizes, true, hidden_states);
  const Kept kept = {pre_activation, pre_activation_scales};
  check_backward(grad_out, hidden_states, sizes, kept,
                 {sizes.experts, 2 * sizes.width, sizes.hidden_size}, grad_gate_up,
                 {sizes.experts, sizes.hidden_size, sizes.width}, grad_down);
  const c10::DeviceGuard guard(hidden_states.device());
  const int parts_of_row = fp8_experts_grad_weight_parts(sizes);
  at::Tensor parts =
      at::empty({sizes.rows, parts_of_row}, hidden_states.options().dtype(at::kFloat));
  const Gradients gradients = {grad_gate_up, grad_down, parts.mutable_data_ptr<float>(),
                               fp8_weight_gradients, sums_are_zero};
  const GivenRows given_grad_out = {quantized_grad_out, grad_out_scales};
  const GivenRows given = {quantized, quantized_scales};
  const at::Tensor grad_of_rows = backward_products(
      {pass, grad_out, hidden_states, given_grad_out, given, experts, kept, gradients});
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  experts_grad_weights(sizes, pass.rows, parts.const_data_ptr<float>(), parts_of_row,
                       grad_weights.mutable_data_ptr<float>(), pass.stream);
  at::Tensor grad_hidden_states = at::empty(hidden_states.sizes(), hidden_states.options());
  experts_combine(sizes, pass.rows, grad_of_rows.const_data_ptr(), nullptr,
                  grad_hidden_states.mutable_data_ptr(), pass.stream);
  return {grad_hidden_states, grad_weights};
}

// One expert of all tokens.
Pass dense_pass(const at::Tensor& hidden_states, const at::Tensor& gate_up, bool transposed) {
  check_hidden_states(hidden_states);
  const auto [experts, width] = experts_and_width(gate_up, transposed);
  TORCH_CHECK(experts == 1, "gate_up must be of one expert, got ", experts);
  const GatedMlpSizes checked = {hidden_states.size(0), hidden_states.size(1), width};
  return {product_sizes(hidden_states, checked), {}, current_stream(hidden_states)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fp8_gated_mlp_forward_cuda(
    const at::Tensor& hidden_states, const at::Tensor& gate_up, const at::Tensor& gate_up_scales,
    const at::Tensor& down, const at::Tensor& down_scales, bool keep_fp8,
    const std::optional<at::Tensor>& quantized, const std::optional<at::Tensor>& quantized_scales) {
  const Pass pass = dense_pass(hidden_states, gate_up, false);
  const QuantizedExperts experts =
      check_experts(gate_up, gate_up_scales, down, down_scales, pass.sizes, false, hidden_states);
  const c10::DeviceGuard guard(hidden_states.device());
  const auto [out, kept] =
      forward_products(pass, hidden_states, {quantized, quantized_scales}, experts, keep_fp8);
  return {out, kept.data, kept.scales};
}

at::Tensor fp8_gated_mlp_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& hidden_states,
    const at::Tensor& gate_up_transposed, const at::Tensor& gate_up_scales,
    const at::Tensor& down_transposed, const at::Tensor& down_scales,
    const at::Tensor& pre_activation, const at::Tensor& pre_activation_scales,
    const at::Tensor& grad_gate_up, const at::Tensor& grad_down, bool fp8_weight_gradients,
    bool sums_are_zero, const std::optional<at::Tensor>& quantized_grad_out,
    const std::optional<at::Tensor>& grad_out_scales, const std::optional<at::Tensor>& quantized,
    const std::optional<at::Tensor>& quantized_scales) {
  const Pass pass = dense_pass(hidden_states, gate_up_transposed, true);
  const ExpertSizes& sizes = pass.sizes;
  const QuantizedExperts experts = check_experts(
      gate_up_transposed, gate_up_scales, down_transposed, down_scales, sizes, true, hidden_states);
  const Kept kept = {pre_activation, pre_activation_scales};
  check_backward(grad_out, hidden_states, sizes, kept, {2 * sizes.width, sizes.hidden_size},
                 grad_gate_up, {sizes.hidden_size, sizes.width}, grad_down);
  const c10::DeviceGuard guard(hidden_states.device());
  const Gradients gradients = {grad_gate_up, grad_down, nullptr, fp8_weight_gradients,
                               sums_are_zero};
  const GivenRows given_grad_out = {quantized_grad_out, grad_out_scales};
  const GivenRows given = {quantized, quantized_scales};
  return backward_products(
      {pass, grad_out, hidden_states, given_grad_out, given, experts, kept, gradients});
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("fp8_quantize_weights", fp8_quantize_weights_cuda);
  library.impl("fp8_quantize_rows", fp8_quantize_rows_cuda);
  library.impl("fp8_experts_forward", fp8_experts_forward_cuda);
  library.impl("fp8_experts_backward", fp8_experts_backward_cuda);
  library.impl("fp8_gated_mlp_forward", fp8_gated_mlp_forward_cuda);
  library.impl("fp8_gated_mlp_backward", fp8_gated_mlp_backward_cuda);
}

}  // namespace megatron_kanana
