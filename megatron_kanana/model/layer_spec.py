"""The Kanana-2 block as a megatron-core layer specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_kanana.device.compatibility import (
    build_from_specification,
    prediction_layer_submodules,
)
from megatron_kanana.kernels.moe.fp8 import Fp8Choices

from .experts import GroupedExperts
from .linear_layers import IN_TORCH, LinearLayers
from .moe_layer import ExpertLayer
from .multi_token_layer import PredictionLayer
from .norm import RMSNorm
from .router import Router
from .shared_experts import SharedExperts


@dataclass(frozen=True)
class ExpertLayerSpec:
    """What a ModuleSpec says, of the layer of experts.

    Of a ModuleSpec, megatron-core's transformer layer knows only its own class of such layers and
    warns of any other, although it builds it just the same.
    """

    params: dict[str, Any]
    submodules: MoESubmodules
    module: type = ExpertLayer

    __call__ = build_from_specification


def block_spec(
    config: MLATransformerConfig,
    core_attention: ModuleSpec,
    experts: Callable[[bool], ExpertLayerSpec],
    linear: LinearLayers,
    norm: type[RMSNorm],
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline rank's (virtual) stage, and the final norm.

    Args:
        experts: the layer of experts, given whether fp8 leaves its transformer layer out.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = []
    for index in range(first, first + count):
        in_bf16 = is_first_last_bf16_layer(config, index)
        of_layer = experts(in_bf16) if config.moe_layer_freq[index] else None
        layers.append(layer_spec(core_attention, of_layer, linear, norm))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def multi_token_prediction_spec(
    config: MLATransformerConfig,
    core_attention: ModuleSpec,
    experts: ExpertLayerSpec,
    linear: LinearLayers,
    norm: type[RMSNorm],
    vp_stage: int | None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token prediction layers (DeepSeek-V3, section 2.2); None on other stages.

    All lie on the last stage. Each one's transformer layer has experts: it comes after the model's
    layers, of which only the first ones are dense. Its projection of two concatenated norms is
    split by columns; megatron-core gathers the columns and deals the sequence out again.
    """
    count = get_mtp_num_layers_to_build(config, vp_stage=vp_stage)
    if count == 0:
        return None
    layer = ModuleSpec(
        module=PredictionLayer,
        submodules=prediction_layer_submodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=linear.column,
            transformer_layer=layer_spec(core_attention, experts, linear, norm),
            layer_norm=norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * count)


def layer_spec(
    core_attention: ModuleSpec,
    experts: ExpertLayerSpec | None,
    linear: LinearLayers,
    norm: type[RMSNorm],
) -> ModuleSpec:
    """One transformer layer: norm, MLA, norm, then experts or, without, a dense feed-forward."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(core_attention, linear, norm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=experts or ModuleSpec(module=MLP, submodules=_mlp_submodules(linear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(
    core_attention: ModuleSpec, linear: LinearLayers, norm: type[RMSNorm]
) -> ModuleSpec:
    # The down-projections are whole on every tensor-parallel rank. Split by columns, the shared
    # rotary key would get only its own rank's gradient (megatron-core gathers it without a sum).
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=linear.column,
            linear_q_down_proj=linear.whole,
            linear_q_up_proj=linear.column,
            linear_kv_down_proj=linear.whole,
            linear_kv_up_proj=linear.column,
            core_attention=core_attention,
            linear_proj=linear.row,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def _mlp_submodules(linear: LinearLayers) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=linear.column, linear_fc2=linear.row)


def expert_layer_spec(
    dispatcher: str, backend: str, *, fp8: Fp8Choices | None = None
) -> ExpertLayerSpec:
    """A layer of experts.

    Args:
        dispatcher: `parallel.token_dispatcher`.
        backend: implementation (see `kernels.moe`).
        fp8: what is in fp8 where routed and shared experts are computed in it; None for bf16.
    """
    params = {"backend": backend}
    of_experts = {**params, "fp8": fp8}
    return ExpertLayerSpec(
        params={"dispatcher": dispatcher, **params},
        submodules=MoESubmodules(
            experts=ModuleSpec(module=GroupedExperts, params=of_experts),
            shared_experts=ModuleSpec(
                module=SharedExperts, params=of_experts, submodules=_mlp_submodules(IN_TORCH)
            ),
            router=partial(Router, **params),
        ),
    )
