"""The operations of csrc/: routing, permutation and experts, for Hopper and for CPUs.

What is kept for the experts' backward pass is their input, their pre-activations, the routing
weights and the permutation; activations are computed again, and the routing weights' gradient needs
no output of an expert (arXiv 2512.14080, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_kanana.native_library import HOPPER_EXPERT_WIDTH_UNIT, hopper_has_expert_widths

from ..native import load_native_operations
from ..weight_gradients import gradient_buffer, gradient_to_return
from .permutation import Permutation

_operations = torch.ops.megatron_kanana


def route(
    logits_TX: torch.Tensor,
    expert_bias_X: torch.Tensor | None,
    num_experts_per_token: int,
    num_groups: int,
    groups_per_token: int,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `route` of the package."""
    _register()
    options = (num_experts_per_token, num_groups, groups_per_token, scaling_factor)
    weights_TK, experts_TK = _Route.apply(logits_TX, expert_bias_X, *options)
    return weights_TK, experts_TK


def count_tokens(
    experts_TK: torch.Tensor, counts_X: torch.Tensor, padding_T: torch.Tensor | None
) -> None:
    """See `count_tokens` of the package."""
    _register()
    _operations.moe_count(experts_TK, padding_T, counts_X)


def permutation_of(experts_TK: torch.Tensor, num_experts: int, num_rows: int) -> Permutation:
    """See `permutation_of` of the package. On a CPU experts and their number are checked."""
    return Permutation(*_permutation_of(experts_TK, num_experts, num_rows))


def _permutation_of(
    experts_TK: torch.Tensor, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _register()
    offsets_E1, slot_of_row_M, row_of_slot_TK = _operations.moe_permutation(
        experts_TK, num_experts, num_rows
    )
    return offsets_E1, slot_of_row_M, row_of_slot_TK


def routed_experts(
    hidden_states_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    permutation: Permutation,
    gate_up_E2ND: torch.Tensor,
    down_EDN: torch.Tensor,
) -> torch.Tensor:
    """See `routed_experts` of the package. fp32 or bf16 on a CPU; on CUDA bf16."""
    return _routed_experts(
        hidden_states_TD,
        weights_TK,
        permutation.offsets_E1,
        permutation.slot_of_row_M,
        permutation.row_of_slot_TK,
        gate_up_E2ND,
        down_EDN,
    )


def _routed_experts(*tensors: torch.Tensor) -> torch.Tensor:
    _register()
    _check_cuda(tensors[0], tensors[-1])
    out_TD: torch.Tensor = _RoutedExperts.apply(*tensors)
    return out_TD


def gated_mlp(
    hidden_states_TD: torch.Tensor, gate_up_2ND: torch.Tensor, down_DN: torch.Tensor
) -> torch.Tensor:
    """See `gated_mlp` of the package."""
    _register()
    _check_cuda(hidden_states_TD, down_DN)
    out_TD: torch.Tensor = _GatedMLP.apply(hidden_states_TD, gate_up_2ND, down_DN)
    return out_TD


# torch.compile takes these functions as they are, as it cannot trace the loading of a library, and
# traces the operations they call. Such a function takes and returns tensors and numbers alone.
for _function in (route, count_tokens, _permutation_of, _routed_experts, gated_mlp):
    torch.compiler.allow_in_graph(_function)


def _check_cuda(hidden_states: torch.Tensor, down: torch.Tensor) -> None:
    hidden_size, width = down.shape[-2:]
    fits = hidden_states.dtype == torch.bfloat16 and hopper_has_expert_widths(hidden_size, width)
    if fits or not hidden_states.is_cuda:
        return
    raise RuntimeError(
        "kernels.moe_backend = csrc: on CUDA it takes bfloat16, and hidden sizes and widths that "
        f"are multiples of {HOPPER_EXPERT_WIDTH_UNIT}, not {hidden_states.dtype}, {hidden_size} "
        f"and {width}; set kernels.moe_backend=torch"
    )


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TX: torch.Tensor,
        expert_bias_X: torch.Tensor | None,
        num_experts_per_token: int,
        num_groups: int,
        groups_per_token: int,
        scaling_factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TX = logits_TX.contiguous()
        weights_TK, experts_TK = _operations.moe_route(
            logits_TX,
            expert_bias_X,
            num_experts_per_token,
            num_groups,
            groups_per_token,
            scaling_factor,
        )
        ctx.save_for_backward(logits_TX, experts_TK)
        ctx.scaling_factor = scaling_factor
        ctx.mark_non_differentiable(experts_TK)
        return weights_TK, experts_TK

    @staticmethod
    def backward(
        ctx: Any, grad_weights_TK: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        logits_TX, experts_TK = ctx.saved_tensors
        grad_logits_TX = _operations.moe_route_backward(
            grad_weights_TK.contiguous(), logits_TX, experts_TK, ctx.scaling_factor
        )
        return grad_logits_TX, None, None, None, None, None


# Backward may write gradients over the pre-activation, which saves its size. Its version then tells
# autograd, which refuses a second backward pass through the same graph.
class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        offsets_E1: torch.Tensor,
        slot_of_row_M: torch.Tensor,
        row_of_slot_TK: torch.Tensor,
        gate_up_E2ND: torch.Tensor,
        down_EDN: torch.Tensor,
    ) -> torch.Tensor:
        hidden_states_TD, weights_TK = hidden_states_TD.contiguous(), weights_TK.contiguous()
        permutation = (offsets_E1, slot_of_row_M, row_of_slot_TK)
        out_TD, pre_activation_M2N = _operations.moe_experts_forward(
            hidden_states_TD,
            weights_TK,
            *permutation,
            gate_up_E2ND.contiguous(),
            down_EDN.contiguous(),
        )
        ctx.save_for_backward(
            hidden_states_TD, weights_TK, *permutation, gate_up_E2ND, down_EDN, pre_activation_M2N
        )
        # Saved ones come back from activation recompute as other tensors, without `main_grad`.
        ctx.parameters = (gate_up_E2ND, down_EDN)
        result: torch.Tensor = out_TD
        return result

    @staticmethod
    def backward(ctx: Any, grad_out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, gate_up_E2ND, down_EDN, pre_activation_M2N = ctx.saved_tensors
        buffers = [gradient_buffer(parameter) for parameter in ctx.parameters]
        grad_hidden_states_TD, grad_weights_TK = _operations.moe_experts_backward(
            grad_out_TD.contiguous(),
            *inputs,
            gate_up_E2ND.contiguous(),
            down_EDN.contiguous(),
            pre_activation_M2N,
            *buffers,
        )
        torch.autograd.graph.increment_version(pre_activation_M2N)
        grad_parameters = map(gradient_to_return, ctx.parameters, buffers)
        return grad_hidden_states_TD, grad_weights_TK, None, None, None, *grad_parameters


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states_TD: torch.Tensor, gate_up_2ND: torch.Tensor, down_DN: torch.Tensor
    ) -> torch.Tensor:
        hidden_states_TD = hidden_states_TD.contiguous()
        out_TD, pre_activation_T2N = _operations.gated_mlp_forward(
            hidden_states_TD, gate_up_2ND.contiguous(), down_DN.contiguous()
        )
        ctx.save_for_backward(hidden_states_TD, gate_up_2ND, down_DN, pre_activation_T2N)
        ctx.parameters = (gate_up_2ND, down_DN)
        result: torch.Tensor = out_TD
        return result

    @staticmethod
    def backward(ctx: Any, grad_out_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states_TD, gate_up_2ND, down_DN, pre_activation_T2N = ctx.saved_tensors
        buffers = [gradient_buffer(parameter) for parameter in ctx.parameters]
        grad_hidden_states_TD = _operations.gated_mlp_backward(
            grad_out_TD.contiguous(),
            hidden_states_TD,
            gate_up_2ND.contiguous(),
            down_DN.contiguous(),
            pre_activation_T2N,
            *buffers,
        )
        torch.autograd.graph.increment_version(pre_activation_T2N)
        return grad_hidden_states_TD, *map(gradient_to_return, ctx.parameters, buffers)


@functools.cache
def _register() -> None:
    """Load the operations, and tell torch.compile the shapes they return."""
    load_native_operations("kernels.moe_backend")
    fakes: dict[str, Callable[..., Any]] = {
        "moe_route": _fake_route,
        "moe_route_backward": _fake_route_backward,
        "moe_count": lambda *_: None,
        "moe_permutation": _fake_permutation,
        "moe_experts_forward": _fake_experts_forward,
        "moe_experts_backward": _fake_experts_backward,
        "gated_mlp_forward": _fake_gated_mlp_forward,
        "gated_mlp_backward": lambda _, hidden_states, *__: torch.empty_like(hidden_states),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"megatron_kanana::{name}", fake)


def _fake_route(
    logits: torch.Tensor, bias: torch.Tensor | None, slots: int, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = logits.new_empty(logits.shape[0], slots)
    return weights, torch.empty_like(weights, dtype=torch.int32)


def _fake_route_backward(
    grad_weights: torch.Tensor, logits: torch.Tensor, *options: Any
) -> torch.Tensor:
    return torch.empty_like(logits)


def _fake_permutation(
    experts: torch.Tensor, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        experts.new_empty(num_experts + 1),
        experts.new_empty(num_rows),
        torch.empty_like(experts),
    )


def _fake_experts_forward(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    slot_of_row: torch.Tensor,
    row_of_slot: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    pre_activation = hidden_states.new_empty(slot_of_row.shape[0], gate_up.shape[1])
    return torch.empty_like(hidden_states), pre_activation


def _fake_experts_backward(
    grad_out: torch.Tensor, hidden_states: torch.Tensor, weights: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden_states), torch.empty_like(weights)


def _fake_gated_mlp_forward(
    hidden_states: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    pre_activation = hidden_states.new_empty(hidden_states.shape[0], gate_up.shape[0])
    return torch.empty_like(hidden_states), pre_activation
