"""A layer of experts by this project and by those a user would pick instead, behind one call.

What is not installed, or refuses a case, raises when it is built or called; nothing is imported
before. Every layer is a module: `layer(inputs)` is the output [T, D]; its parameters are the very
tensors of `Weights`, and have an fp32 `main_grad` as under megatron-core's data parallelism.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .megatron_model import CUTLASS
from .moe_cases import Case, Inputs, Weights, compiled_routing


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        build: makes the layer.
        with_shared: whether it has the shared experts.
        environment: variables it reads in every call.
    """

    build: Callable[[Case, Weights, Inputs], nn.Module]
    with_shared: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def built(contender: Contender, case: Case, weights: Weights, inputs: Inputs) -> nn.Module:
    """The layer, with its fp32 gradients."""
    layer = contender.build(case, weights, inputs)
    give_main_grads(layer)
    return layer


def step(contender: Contender, layer: nn.Module, inputs: Inputs) -> None:
    """Forward and backward; gradients of weights are added to `main_grad`, others are dropped."""
    os.environ.update(contender.environment)
    layer(inputs).backward(inputs.grad_out_TD)
    drop_gradients(inputs)


def drop_gradients(inputs: Inputs) -> None:
    """Forget the gradients of what a layer was given."""
    inputs.hidden_states_TD.grad = None
    if inputs.weights_TK is not None:
        inputs.weights_TK.grad = None


def give_main_grads(layer: nn.Module) -> None:
    """What megatron-core's DistributedDataParallel does to parameters: a buffer and a hook."""
    nodes: list[Any] = []
    parameter: Any
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
        nodes.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(functools.partial(_add_to_main_grad, parameter))
    layer.__dict__["gradient_nodes"] = nodes  # which live as long as somebody knows them


def _add_to_main_grad(parameter: Any, *_: object) -> None:
    if parameter.grad is not None and not parameter.grad_added_to_main_grad:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


class OurLayer(nn.Module):
    """This project's router, permutation, experts and shared experts."""

    def __init__(
        self, case: Case, weights: Weights, inputs: Inputs, *, shared: bool, backend: str = "csrc"
    ) -> None:
        super().__init__()
        self.case, self.backend = case, backend
        self.expert_bias_X, self.rows = inputs.expert_bias_X, inputs.rows
        self.counts_X = torch.zeros_like(inputs.expert_bias_X)
        self.gate_up = nn.Parameter(weights.gate_up_E2ND)
        self.down = nn.Parameter(weights.down_EDN)
        self.router = nn.Parameter(weights.router_XD) if case.processes == 1 else None
        self.shared_gate_up = self.shared_down = None
        if shared and weights.shared_gate_up_2SD is not None:
            assert weights.shared_down_DS is not None
            self.shared_gate_up = nn.Parameter(weights.shared_gate_up_2SD)
            self.shared_down = nn.Parameter(weights.shared_down_DS)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        from megatron_kanana.kernels.moe import (
            count_tokens,
            gated_mlp,
            permutation_of,
            route,
            routed_experts,
        )
        from megatron_kanana.model.gating import gating_logits

        hidden_states_TD = inputs.hidden_states_TD
        weights_TK, experts_TK = inputs.weights_TK, inputs.experts_TK
        if self.router is not None:
            weights_TK, experts_TK = route(
                gating_logits(hidden_states_TD, self.router),
                self.expert_bias_X,
                num_experts_per_token=self.case.experts_per_token,
                scaling_factor=self.case.scaling_factor,
                backend=self.backend,
            )
            count_tokens(experts_TK, self.counts_X, backend=self.backend)
        assert weights_TK is not None and experts_TK is not None
        permutation = permutation_of(
            experts_TK, self.case.local_experts, self.rows, backend=self.backend
        )
        out_TD = routed_experts(
            hidden_states_TD,
            weights_TK,
            permutation,
            self.gate_up,
            self.down,
            backend=self.backend,
        )
        if self.shared_gate_up is not None and self.shared_down is not None:
            out_TD = out_TD + gated_mlp(
                hidden_states_TD, self.shared_gate_up, self.shared_down, backend=self.backend
            )
        return out_TD


class PlainTorchLayer(nn.Module):
    """argsort, gather, grouped products, compiled SwiGLU, index_add; no shared experts."""

    def __init__(self, case: Case, weights: Weights, inputs: Inputs) -> None:
        super().__init__()
        self.case, self.expert_bias_X, self.rows = case, inputs.expert_bias_X, inputs.rows
        self.gate_up = nn.Parameter(weights.gate_up_E2ND)
        self.down = nn.Parameter(weights.down_EDN)
        self.router = nn.Parameter(weights.router_XD) if case.processes == 1 else None
        self.swiglu = torch.compile(_weighted_swiglu, dynamic=False)
        self.routing = compiled_routing(case)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        hidden_states_TD = inputs.hidden_states_TD
        weights_TK, experts_TK = inputs.weights_TK, inputs.experts_TK
        if self.router is not None:
            weights_TK, experts_TK = self.routing(
                F.linear(hidden_states_TD, self.router), self.expert_bias_X
            )
        assert weights_TK is not None and experts_TK is not None
        experts = self.case.local_experts
        expert_of_slot = experts_TK.flatten()
        if self.case.processes > 1:
            expert_of_slot = expert_of_slot.where(expert_of_slot >= 0, experts)
        slot_of_row_M = expert_of_slot.argsort(stable=True)[: self.rows]
        sorted_M = expert_of_slot[slot_of_row_M]
        ends_E = torch.searchsorted(
            sorted_M,
            torch.arange(experts, device=sorted_M.device, dtype=sorted_M.dtype),
            right=True,
        ).int()
        token_of_row_M = slot_of_row_M // self.case.experts_per_token
        rows_MD = hidden_states_TD.index_select(0, token_of_row_M)
        pre_activation_M2N = grouped_mm(rows_MD, self.gate_up.mT, ends_E)
        row_weights_M = weights_TK.flatten().index_select(0, slot_of_row_M)
        activation_MN = self.swiglu(pre_activation_M2N, row_weights_M)
        rows_MD = grouped_mm(activation_MN, self.down.mT, ends_E)
        return torch.zeros_like(hidden_states_TD).index_add(0, token_of_row_M, rows_MD)


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's product of each group of rows with its own matrix."""
    function: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    result: torch.Tensor = function(rows, weights, offs=ends)
    return result


def _weighted_swiglu(pre_activation_M2N: torch.Tensor, weights_M: torch.Tensor) -> torch.Tensor:
    gate_MN, up_MN = pre_activation_M2N.float().chunk(2, dim=1)
    activation_MN = F.silu(gate_MN) * up_MN * weights_M[:, None]
    return activation_MN.to(pre_activation_M2N.dtype)


def _megatron_layer(case: Case, weights: Weights, inputs: Inputs) -> nn.Module:
    from .moe_megatron import megatron_layer

    return megatron_layer(case, weights, inputs)


def _sonicmoe_layer(case: Case, weights: Weights, inputs: Inputs) -> nn.Module:
    from .moe_sonicmoe import SonicMoELayer

    return SonicMoELayer(case, weights, inputs)


OURS = "ours"
OURS_ROUTED = "ours without shared experts"
MEGATRON = "megatron-core + TE, CUTLASS grouped GEMM"
MEGATRON_CUBLAS = "megatron-core + TE, cuBLAS streams"
PLAIN = "plain torch, grouped_mm (no shared experts)"
SONICMOE = "SonicMoE (no shared experts)"

CONTENDERS = {
    OURS: Contender(functools.partial(OurLayer, shared=True)),
    OURS_ROUTED: Contender(functools.partial(OurLayer, shared=False), with_shared=False),
    MEGATRON: Contender(_megatron_layer, environment={CUTLASS: "1"}),
    MEGATRON_CUBLAS: Contender(_megatron_layer, environment={CUTLASS: "0"}),
    PLAIN: Contender(PlainTorchLayer, with_shared=False),
    SONICMOE: Contender(_sonicmoe_layer, with_shared=False),
}
SHORT_NAMES = {
    "ours": OURS,
    "ours_routed": OURS_ROUTED,
    "megatron": MEGATRON,
    "megatron_cublas": MEGATRON_CUBLAS,
    "plain": PLAIN,
    "sonicmoe": SONICMOE,
}
