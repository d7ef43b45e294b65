"""megatron-core's layer of experts with Transformer Engine, every fusion it has switched on."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .moe_cases import Case, Inputs, Weights


def megatron_layer(case: Case, weights: Weights, inputs: Inputs) -> nn.Module:
    """The whole layer, or where experts are shared among processes their computation alone."""
    start_megatron_core()
    if case.processes > 1:
        return MegatronExperts(case, weights, inputs)
    return MegatronLayer(case, weights, inputs)


@functools.cache
def start_megatron_core() -> None:
    """One process, which is its own group in every direction."""
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def megatron_config(case: Case, **changes: Any) -> Any:
    """megatron-core's configuration of the layer; `changes` for machines without fused kernels."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": case.hidden_size,
        "num_attention_heads": 16,
        "ffn_hidden_size": 4 * case.hidden_size,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "num_moe_experts": case.local_experts,
        "moe_ffn_hidden_size": case.width,
        "moe_shared_expert_intermediate_size": case.shared_width or None,
        "moe_router_topk": min(case.experts_per_token, case.local_experts),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": case.scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "bias_activation_fusion": True,
        "gradient_accumulation_fusion": True,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "perform_initialization": False,
    }
    return TransformerConfig(**{**options, **changes})


class MegatronLayer(nn.Module):
    """MoELayer: router, all-to-all dispatcher, TEGroupedMLP, shared experts."""

    def __init__(self, case: Case, weights: Weights, inputs: Inputs) -> None:
        super().__init__()
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.spec_utils import build_module

        spec = get_moe_module_spec(use_te=True, num_experts=case.experts, moe_grouped_gemm=True)
        self.layer = build_module(spec, config=megatron_config(case)).to("cuda")
        self.layer.router.weight.data = weights.router_XD
        self.layer.router.expert_bias.copy_(inputs.expert_bias_X)
        use_weights(self.layer.experts, weights)
        if self.layer.shared_experts is not None:
            self.layer.shared_experts.linear_fc1.weight.data = weights.shared_gate_up_2SD
            self.layer.shared_experts.linear_fc2.weight.data = weights.shared_down_DS

    def forward(self, inputs: Inputs) -> torch.Tensor:
        out, _ = self.layer(inputs.hidden_states_TD[:, None])
        result: torch.Tensor = out[:, 0]
        return result


class MegatronExperts(nn.Module):
    """Permutation, TEGroupedMLP and combination of tokens whose routing is given."""

    def __init__(self, case: Case, weights: Weights, inputs: Inputs) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import TEGroupedMLP
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        self.rows = inputs.rows
        self.experts = TEGroupedMLP(
            case.local_experts,
            megatron_config(case),
            MLPSubmodules(
                linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
            ),
            pg_collection=get_default_pg_collection(),
        ).to("cuda")
        use_weights(self.experts, weights)
        assert inputs.weights_TK is not None and inputs.experts_TK is not None
        self.probabilities_TE, self.chosen_TE = dense_routing(
            inputs.weights_TK.detach(), inputs.experts_TK, case.local_experts
        )
        self.probabilities_TE.requires_grad_()

    def forward(self, inputs: Inputs) -> torch.Tensor:
        self.probabilities_TE.grad = None
        return self.compute(inputs.hidden_states_TD, self.probabilities_TE, self.chosen_TE)

    def compute(
        self,
        hidden_states_TD: torch.Tensor,
        probabilities_TE: torch.Tensor,
        chosen_TE: torch.Tensor,
    ) -> torch.Tensor:
        """Output [T, D] of the experts that are chosen, weighted with their probabilities."""
        from megatron.core.transformer.moe.moe_utils import permute, unpermute

        rows_MD, probabilities_M, order = permute(
            hidden_states_TD,
            chosen_TE,
            probs=probabilities_TE,
            num_out_tokens=self.rows,
            fused=True,
        )
        rows_MD, _ = self.experts(rows_MD, chosen_TE.sum(0).cpu(), probabilities_M)
        out_TD: torch.Tensor = unpermute(rows_MD, order, hidden_states_TD.shape, fused=True)
        return out_TD


def use_weights(experts: Any, weights: Weights) -> None:
    """Let each expert's parameters be parts of the tensors of all experts."""
    for index, (gate_up_2ND, down_DN) in enumerate(
        zip(weights.gate_up_E2ND, weights.down_EDN, strict=True)
    ):
        getattr(experts.linear_fc1, f"weight{index}").data = gate_up_2ND
        getattr(experts.linear_fc2, f"weight{index}").data = down_DN


def dense_routing(
    weights_TK: torch.Tensor, experts_TK: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities fp32 and choice bool, both [T, E]; experts of -1 are left out."""
    place_TK = experts_TK.long().where(experts_TK >= 0, experts)
    probabilities = weights_TK.new_zeros(len(weights_TK), experts + 1)
    chosen = torch.zeros_like(probabilities, dtype=torch.bool)
    probabilities.scatter_(1, place_TK, weights_TK)
    chosen.scatter_(1, place_TK, True)
    return probabilities[:, :experts].contiguous(), chosen[:, :experts].contiguous()
