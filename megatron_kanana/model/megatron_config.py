"""Translation of the settings to megatron-core's configuration of the transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.config import Settings
from megatron_kanana.device import Device


def transformer_config(settings: Settings, device: Device) -> MLATransformerConfig:
    """megatron-core's configuration for this model, layout and precision."""
    model, parallel = settings.model, settings.parallel
    full_recompute = parallel.recompute == "full"
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
        rope_type="yarn" if model.yarn_factor > 1 else "rope",
        rotary_base=model.rotary_base,
        rotary_scaling_factor=model.yarn_factor,
        original_max_position_embeddings=model.yarn_original_context,
        beta_fast=model.yarn_beta_fast,
        beta_slow=model.yarn_beta_slow,
        mscale=model.yarn_mscale,
        mscale_all_dim=model.yarn_mscale_all_dim,
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
        recompute_granularity="full" if full_recompute else None,
        recompute_method="uniform" if full_recompute else None,
        recompute_num_layers=1 if full_recompute else None,
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
        apply_rope_fusion=False,
    )
