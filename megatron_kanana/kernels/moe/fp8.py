"""The experts in fp8 (e4m3) on Hopper: products forward and gradients of their inputs.

Rows have a scale for each 128 numbers, weights for each 128 x 128 (DeepSeek-V3, arXiv 2412.19437,
section 3.3.2); sums of 128 products are added in fp32. Weights' gradients, sums over rows, are
products in bf16 or in fp8; in fp8 the gathered rows have one scale each, by which the rows they
meet are multiplied before they are quantised, 128 x 128 of them with a scale. What is kept for the
backward pass is what `compiled` keeps, or the pre-activation in e4m3 with a scale for each 128
numbers.

Shape suffixes: those of the package, and R x C blocks of 128 rows and columns of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_kanana.native_library import HOPPER_FP8_EXPERT_WIDTH_UNIT

from ..native import load_native_operations
from ..weight_gradients import gradient_buffer, gradient_to_return
from .common_rows import CommonRows
from .permutation import Permutation

_operations = torch.ops.megatron_kanana


@dataclass(frozen=True)
class Fp8Choices:
    """What is in fp8 beside the products of the forward pass and of the inputs' gradients.

    Attributes:
        kept_activations: the pre-activation, as it is kept for the backward pass.
        weight_gradients: the products of the weights' gradients.
    """

    kept_activations: bool = False
    weight_gradients: bool = False


IN_BF16 = Fp8Choices()


@dataclass(frozen=True)
class QuantizedWeights:
    """One projection of all experts in e4m3, in both orders: tensor cores sum along rows alone.

    Attributes:
        data: e4m3 [experts, rows, columns].
        transposed: e4m3 [experts, columns, rows].
        scales_ERC: fp32 [experts, rows / 128, columns / 128], by which both are multiplied.
    """

    data: torch.Tensor
    transposed: torch.Tensor
    scales_ERC: torch.Tensor


def quantize_weights(weights: torch.Tensor) -> QuantizedWeights:
    """Weights as the experts in fp8 take them.

    Args:
        weights: bf16 [experts, rows, columns], rows and columns multiples of 128.

    Raises:
        RuntimeError: they are not, or this device has no such operation.
    """
    load_native_operations("precision.experts")
    unit = HOPPER_FP8_EXPERT_WIDTH_UNIT
    if any(size % unit for size in weights.shape[1:]):
        raise RuntimeError(
            f"precision.experts = fp8: weights have blocks of {unit} x {unit}, which rows and "
            f"columns of {tuple(weights.shape[1:])} do not fill; set precision.experts=bf16"
        )
    return QuantizedWeights(*_operations.fp8_quantize_weights(weights.detach()))


def routed_experts_fp8(
    hidden_states_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    permutation: Permutation,
    gate_up_E2ND: torch.Tensor,
    down_EDN: torch.Tensor,
    quantized_gate_up: QuantizedWeights,
    quantized_down: QuantizedWeights,
    *,
    choices: Fp8Choices = IN_BF16,
    sums_are_zero: bool = False,
    common_rows: CommonRows | None = None,
) -> torch.Tensor:
    """As `routed_experts`, in fp8.

    Args:
        hidden_states_TD: bf16 [tokens, hidden size].
        weights_TK: fp32 [tokens, K].
        permutation: of the same slots.
        gate_up_E2ND: bf16 [experts, 2 * width, hidden size]; gets the gradient.
        down_EDN: bf16 [experts, hidden size, width]; gets the gradient.
        quantized_gate_up: of the same weights.
        quantized_down: of the same weights.
        choices: what else is in fp8.
        sums_are_zero: whether the weights' `main_grad` is zero when the backward pass comes to it,
            and may be overwritten.
        common_rows: of this forward pass, where `gated_mlp_fp8` takes the same hidden states and
            its output is added to this one; both get it then.

    Returns:
        bf16 [tokens, hidden size].
    """
    out_TD: torch.Tensor = _RoutedExperts.apply(
        hidden_states_TD,
        weights_TK,
        permutation,
        gate_up_E2ND,
        down_EDN,
        quantized_gate_up,
        quantized_down,
        choices,
        sums_are_zero,
        common_rows,
    )
    return out_TD


def gated_mlp_fp8(
    hidden_states_TD: torch.Tensor,
    gate_up_2ND: torch.Tensor,
    down_DN: torch.Tensor,
    quantized_gate_up: QuantizedWeights,
    quantized_down: QuantizedWeights,
    *,
    choices: Fp8Choices = IN_BF16,
    sums_are_zero: bool = False,
    common_rows: CommonRows | None = None,
) -> torch.Tensor:
    """As `gated_mlp`, in fp8; the quantised weights are those of one expert.

    The others are those of `routed_experts_fp8`.
    """
    out_TD: torch.Tensor = _GatedMLP.apply(
        hidden_states_TD,
        gate_up_2ND,
        down_DN,
        quantized_gate_up,
        quantized_down,
        choices,
        sums_are_zero,
        common_rows,
    )
    return out_TD


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        permutation: Permutation,
        gate_up_E2ND: torch.Tensor,
        down_EDN: torch.Tensor,
        quantized_gate_up: QuantizedWeights,
        quantized_down: QuantizedWeights,
        choices: Fp8Choices,
        sums_are_zero: bool,
        common_rows: CommonRows | None,
    ) -> torch.Tensor:
        inputs = (
            hidden_states_TD.contiguous(),
            weights_TK.contiguous(),
            permutation.offsets_E1,
            permutation.slot_of_row_M,
            permutation.row_of_slot_TK,
        )
        out_TD, *kept = _operations.fp8_experts_forward(
            *inputs,
            *_forward_order(quantized_gate_up, quantized_down),
            choices.kept_activations,
            *_common_in_forward(common_rows, inputs[0]),
        )
        ctx.save_for_backward(*inputs, *kept)
        ctx.parameters = (gate_up_E2ND, down_EDN)
        ctx.quantized = (quantized_gate_up, quantized_down)
        ctx.of_weights = (choices.weight_gradients, sums_are_zero)
        ctx.common_rows = common_rows
        result: torch.Tensor = out_TD
        return result

    @staticmethod
    def backward(ctx: Any, grad_out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, pre_activation_M2N, scales = ctx.saved_tensors
        buffers = [gradient_buffer(parameter) for parameter in ctx.parameters]
        grad_out_TD = grad_out_TD.contiguous()
        grad_hidden_states_TD, grad_weights_TK = _operations.fp8_experts_backward(
            grad_out_TD,
            *inputs,
            *_backward_order(*ctx.quantized),
            pre_activation_M2N,
            scales,
            *buffers,
            *ctx.of_weights,
            *_common_in_backward(ctx, grad_out_TD, inputs[0]),
        )
        _mark_as_overwritten(pre_activation_M2N, ctx)
        grad_parameters = map(gradient_to_return, ctx.parameters, buffers)
        nothing = (None,) * 5
        return grad_hidden_states_TD, grad_weights_TK, None, *grad_parameters, *nothing


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states_TD: torch.Tensor,
        gate_up_2ND: torch.Tensor,
        down_DN: torch.Tensor,
        quantized_gate_up: QuantizedWeights,
        quantized_down: QuantizedWeights,
        choices: Fp8Choices,
        sums_are_zero: bool,
        common_rows: CommonRows | None,
    ) -> torch.Tensor:
        hidden_states_TD = hidden_states_TD.contiguous()
        out_TD, *kept = _operations.fp8_gated_mlp_forward(
            hidden_states_TD,
            *_forward_order(quantized_gate_up, quantized_down),
            choices.kept_activations,
            *_common_in_forward(common_rows, hidden_states_TD),
        )
        ctx.save_for_backward(hidden_states_TD, *kept)
        ctx.parameters = (gate_up_2ND, down_DN)
        ctx.quantized = (quantized_gate_up, quantized_down)
        ctx.of_weights = (choices.weight_gradients, sums_are_zero)
        ctx.common_rows = common_rows
        result: torch.Tensor = out_TD
        return result

    @staticmethod
    def backward(ctx: Any, grad_out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states_TD, pre_activation_T2N, scales = ctx.saved_tensors
        buffers = [gradient_buffer(parameter) for parameter in ctx.parameters]
        grad_out_TD = grad_out_TD.contiguous()
        grad_hidden_states_TD = _operations.fp8_gated_mlp_backward(
            grad_out_TD,
            hidden_states_TD,
            *_backward_order(*ctx.quantized),
            pre_activation_T2N,
            scales,
            *buffers,
            *ctx.of_weights,
            *_common_in_backward(ctx, grad_out_TD, hidden_states_TD),
        )
        _mark_as_overwritten(pre_activation_T2N, ctx)
        grad_parameters = map(gradient_to_return, ctx.parameters, buffers)
        nothing = (None,) * 5
        return grad_hidden_states_TD, *grad_parameters, *nothing


def _common_in_forward(
    common_rows: CommonRows | None, hidden_states_TD: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Last arguments of an operation, which quantises itself what it is not given."""
    return () if common_rows is None else common_rows.for_forward(hidden_states_TD)


def _common_in_backward(
    ctx: Any, grad_out_TD: torch.Tensor, hidden_states_TD: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if ctx.common_rows is None:
        return ()
    weight_gradients, _ = ctx.of_weights
    rows: tuple[torch.Tensor, ...] = ctx.common_rows.for_backward(
        grad_out_TD, hidden_states_TD, weight_gradients=weight_gradients
    )
    return rows


def _mark_as_overwritten(pre_activation: torch.Tensor, ctx: Any) -> None:
    """Gradients in bf16 take the place of one in bf16; autograd then refuses another backward."""
    weight_gradients_in_fp8, _ = ctx.of_weights
    if pre_activation.dtype == torch.bfloat16 and not weight_gradients_in_fp8:
        torch.autograd.graph.increment_version(pre_activation)


def _forward_order(gate_up: QuantizedWeights, down: QuantizedWeights) -> tuple[torch.Tensor, ...]:
    return gate_up.data, gate_up.scales_ERC, down.data, down.scales_ERC


def _backward_order(gate_up: QuantizedWeights, down: QuantizedWeights) -> tuple[torch.Tensor, ...]:
    return gate_up.transposed, gate_up.scales_ERC, down.transposed, down.scales_ERC
