"""Building this process's part of the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.config import Settings
from megatron_kanana.device import Device
from megatron_kanana.kernels.backend import Backends
from megatron_kanana.kernels.moe.fp8 import Fp8Choices

from .attention import core_attention_spec
from .embedding import add_embedding_gradients_in_place
from .initialization import initialize_weights
from .layer_spec import (
    ExpertLayerSpec,
    block_spec,
    expert_layer_spec,
    multi_token_prediction_spec,
)
from .linear_layers import (
    leave_out_of_fp8,
    linear_layers,
    mark_whole_layers,
    quantize_dense_by_csrc,
)
from .linear_loss import LinearLossGPTModel
from .multi_token import MultiTokenGPTModel
from .norm import norm_class


def build_model(
    settings: Settings, config: MLATransformerConfig, device: Device, backends: Backends
) -> list[torch.nn.Module]:
    """The model chunks of this process, initialised: one, or one a virtual pipeline stage."""
    stages = settings.parallel.virtual_pipeline_stages
    return [
        _build_chunk(settings, config, device, backends, stage if stages > 1 else None)
        for stage in range(stages)
    ]


def _build_chunk(
    settings: Settings,
    config: MLATransformerConfig,
    device: Device,
    backends: Backends,
    vp_stage: int | None,
) -> torch.nn.Module:
    chunk = gpt_model(settings, config, backends, vp_stage)
    chunk.to(device.torch_device)
    mark_whole_layers(chunk)
    if backends.norm == "csrc":
        add_embedding_gradients_in_place(chunk)
    leave_out_of_fp8(chunk, settings.precision.bf16_weights)
    is_cuda = device.torch_device.type == "cuda"
    if is_cuda and backends.linear == "te" and settings.precision.fp8 == "blockwise":
        quantize_dense_by_csrc(chunk)
    initialize_weights(chunk.sharded_state_dict(), settings.model, settings.seed, settings.transfer)
    in_bf16 = device.dtype == torch.bfloat16
    module: torch.nn.Module = Float16Module(config, chunk) if in_bf16 else chunk
    return module


def gpt_model(
    settings: Settings,
    config: MLATransformerConfig,
    backends: Backends,
    vp_stage: int | None = None,
) -> Any:
    """megatron-core's GPTModel with the project's layers; weights are megatron-core's."""
    model_class = MultiTokenGPTModel if settings.model.num_mtp_layers else LinearLossGPTModel
    attention = core_attention_spec(backends.attention, settings.kernels.deterministic)
    in_fp8 = Fp8Choices(
        kept_activations=settings.precision.kept_activations == "fp8",
        weight_gradients=settings.precision.expert_weight_gradients == "fp8",
    )

    def experts(in_bf16: bool) -> ExpertLayerSpec:
        return expert_layer_spec(
            settings.parallel.token_dispatcher,
            backends.experts,
            fp8=in_fp8 if backends.experts_fp8 and not in_bf16 else None,
        )

    linear, norm = linear_layers(backends.linear), norm_class(backends.norm)
    return model_class(
        config=config,
        transformer_layer_spec=block_spec(config, attention, experts, linear, norm, vp_stage),
        mtp_block_spec=multi_token_prediction_spec(
            config, attention, experts(False), linear, norm, vp_stage
        ),
        vocab_size=settings.model.padded_vocab_size,
        max_sequence_length=settings.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
        loss_backend=backends.loss,
        loss_fp8=backends.output_layer_fp8,
    )
