"""Translation of the settings to megatron-core's configuration of the transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.config import Settings
from megatron_kanana.config.schema import ParallelSettings
from megatron_kanana.device import Device
from megatron_kanana.kernels.backend import REFERENCE, Backends

from .rotary import rotary_options


def transformer_config(
    settings: Settings, device: Device, backends: Backends = REFERENCE
) -> MLATransformerConfig:
    """megatron-core's configuration for this model, layout and precision.

    Args:
        settings: checked.
        device: gives the format of weights and activations.
        backends: what the model will compute with; fp8 comes with Transformer Engine's layers.
    """
    model, parallel = settings.model, settings.parallel
    grouped = model.num_expert_groups > 1
    interleaved = parallel.virtual_pipeline_stages > 1
    return MLATransformerConfig(
        # Sizes
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        # Block
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.zero_centered_gamma,
        qk_layernorm=True,
        **rotary_options(settings, backends.rope),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Experts
        num_moe_experts=model.num_experts,
        moe_layer_freq=[int(i >= model.num_dense_layers) for i in range(model.num_layers)],
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.shared_expert_hidden_size or None,
        moe_router_topk=model.num_experts_per_token,
        moe_router_num_groups=model.num_expert_groups if grouped else None,
        moe_router_group_topk=model.num_expert_groups_per_token if grouped else None,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=model.expert_bias_update_rate,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=model.balance_loss_coefficient,
        moe_z_loss_coeff=model.z_loss_coefficient or None,
        # Multi-token prediction: megatron-core takes None for "without"
        mtp_num_layers=model.num_mtp_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_coefficient,
        # Layout
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.tensor_parallel_size > 1,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_stages if interleaved else None
        ),
        account_for_embedding_in_pipeline_split=parallel.embeddings_count_as_layers,
        account_for_loss_in_pipeline_split=parallel.embeddings_count_as_layers,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        pipeline_dtype=device.dtype,
        # With two ranks both neighbours are the same process, which would mix up batched messages.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        **_recompute_options(parallel),
        # Numbers
        bf16=device.dtype == torch.bfloat16,
        params_dtype=device.dtype,
        perform_initialization=True,  # overwritten, but it also marks which parameters are split
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        # torch.compile specialises on each expert's number of tokens and soon gives up.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **_fp8_options(settings, backends.linear),
    )


def _fp8_options(settings: Settings, linear_backend: str) -> dict[str, Any]:
    """megatron-core enters Transformer Engine's fp8 context around each layer that is not left out.

    In blocks, gradients are e4m3 as well (DeepSeek-V3, section 3.3.2); with one scale for a tensor
    they need e5m2's range.
    """
    precision = settings.precision
    if linear_backend != "te" or precision.fp8 == "none":
        return {}
    return {
        "fp8": "hybrid" if precision.fp8 == "tensorwise" else "e4m3",
        "fp8_recipe": precision.fp8,
        "first_last_layers_bf16": precision.bf16_layers_at_start + precision.bf16_layers_at_end > 0,
        "num_layers_at_start_in_bf16": precision.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": precision.bf16_layers_at_end,
    }


_RECOMPUTE_MODULES = {
    "norms": "layernorm",
    "up_projections": "mla_up_proj",
    "dense_feed_forward": "mlp",
}
"""megatron-core's names of `parallel.recompute_parts`."""


def _recompute_options(parallel: ParallelSettings) -> dict[str, Any]:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        uniform = {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {"recompute_granularity": "full", **uniform}
    modules = [_RECOMPUTE_MODULES[part] for part in parallel.recompute_parts]
    return {"recompute_granularity": "selective", "recompute_modules": modules}
