"""What a user would pick instead: megatron-core's own model, with Transformer Engine on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from megatron_kanana.config import Settings
from megatron_kanana.device import Device

CUTLASS = "NVTE_USE_CUTLASS_GROUPED_GEMM"
"""Variable with which Transformer Engine computes all experts in one launch, its fastest way."""

FUSED: Mapping[str, Any] = {
    "rope_type": "yarn",  # the only one whose fused kernel knows MLA; of factor 1 it is plain
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": True,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
}
"""megatron-core's fusions, with which it was fastest."""

ON_CPU: Mapping[str, Any] = {"moe_token_dispatcher_type": "allgather"}
"""Its all-to-all makes CUDA streams."""


def megatron_model(settings: Settings, device: Device, **changes: Any) -> tuple[Any, nn.Module]:
    """Its configuration, and the model of this process with random weights.

    Args:
        settings: of ours.
        device: where it computes; on a CPU without Transformer Engine and its fusions, and with our
            attention, as its own knows no MLA there.
        changes: of the configuration on a GPU, such as `fp8="e4m3"`.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe import moe_utils

    from megatron_kanana.model.attention import core_attention_spec
    from megatron_kanana.model.megatron_config import transformer_config

    fused = device.is_cuda
    options = {**FUSED, **changes} if fused else ON_CPU
    config = dataclasses.replace(transformer_config(settings, device), **options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=fused, normalization="RMSNorm")
    if not fused:
        # megatron-core looks for a name that it has not imported then.
        vars(moe_utils).setdefault("te_general_gemm", None)
        for layer in spec.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = core_attention_spec("torch", deterministic=False)
    with _without_apex():
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=settings.model.padded_vocab_size,
            max_sequence_length=settings.data.sequence_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ).to(device.torch_device)
    in_bf16 = device.dtype == torch.bfloat16
    return config, Float16Module(config, model) if in_bf16 else model


@contextlib.contextmanager
def _without_apex() -> Iterator[None]:
    """Build an output layer without Apex: its weight gradient alone is then not fused."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, layers

    if layers._grad_accum_fusion_available:
        yield
        return
    original = ColumnParallelLinear.__init__

    def build(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self.gradient_accumulation_fusion = False

    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(ColumnParallelLinear, "__init__", build),
    ):
        yield
