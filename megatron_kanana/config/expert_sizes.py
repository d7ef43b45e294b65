"""The sizes of a layer of experts that its kernels look at."""

from __future__ import annotations

from megatron_kanana.native_library import ExpertLayerSizes

from .schema import Settings


def expert_layer_sizes(settings: Settings) -> ExpertLayerSizes:
    """Of the layers of these settings, on one process."""
    model, parallel = settings.model, settings.parallel
    return ExpertLayerSizes(
        hidden_size=model.hidden_size,
        width=model.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size,
        shared_width=model.shared_expert_hidden_size // parallel.tensor_parallel_size,
        num_experts=model.num_experts,
        num_experts_per_token=model.num_experts_per_token,
        num_groups=model.num_expert_groups,
    )
