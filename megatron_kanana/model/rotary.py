"""Rotary embeddings in megatron-core's terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.config import Settings


def rotary_options(settings: Settings, backend: str) -> dict[str, Any]:
    """Options of `MLATransformerConfig`.

    megatron-core's kernel is for YaRN alone. YaRN by a factor of 1 is plain RoPE, bit by bit where
    no channel lies between those that keep their frequency and those that are slowed: both
    frequencies of a channel are the same then, but not the sum of a share of each.

    Args:
        settings: give the model and the length of its sequences.
        backend: `kernels.rope_backend`, 'triton' or 'torch'.
    """
    model = settings.model
    is_extended = model.yarn_factor > 1
    is_fused = backend == "triton"
    return {
        "rope_type": "yarn" if is_extended or is_fused else "rope",
        "rotary_base": model.rotary_base,
        "rotary_scaling_factor": model.yarn_factor,
        # Each layer begins with a table of so many positions.
        "original_max_position_embeddings": (
            model.yarn_original_context if is_extended else settings.data.sequence_length
        ),
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow if is_extended else model.yarn_beta_fast,
        "mscale": model.yarn_mscale,
        "mscale_all_dim": model.yarn_mscale_all_dim,
        "apply_rope_fusion": is_fused,
    }


@contextmanager
def any_number_of_tokens(config: MLATransformerConfig) -> Iterator[None]:
    """Compute without what is for whole training sequences alone.

    megatron-core's rotary kernel has no cache of keys and values, and products in fp8 take tokens
    in multiples of 16 or 32. Both are looked up in the configuration at each forward pass.

    Args:
        config: the one that the model was built with.
    """
    before = config.apply_rope_fusion, config.fp8
    config.apply_rope_fusion, config.fp8 = False, None
    try:
        yield
    finally:
        config.apply_rope_fusion, config.fp8 = before
