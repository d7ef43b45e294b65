"""Sizes that megatron-core's kernel for rotary embeddings takes."""

from __future__ import annotations

from collections.abc import Iterator

from .schema import Settings


def fused_rope_limits_passed(settings: Settings) -> Iterator[str]:
    """What of the settings the kernel does not take, as '… a power of two, not …'.

    It deals heads out in blocks whose number is a power of two and masks the last block wrongly,
    and Triton's ranges are powers of two (megatron-core, `fusions/fused_mla_yarn_rope_apply.py`).
    """
    model, parts = settings.model, settings.parallel.tensor_parallel_size
    heads = model.num_attention_heads // parts
    sizes = {
        "model.num_attention_heads over parallel.tensor_parallel_size": heads,
        "model.qk_nope_head_dim": model.qk_nope_head_dim,
        "model.qk_rope_head_dim of at least 4": max(3, model.qk_rope_head_dim),
        "model.v_head_dim": model.v_head_dim,
    }
    if settings.parallel.context_parallel_size > 1:
        split = settings.parallel.context_parallel_size
        yield f"whole sequences, not parts of parallel.context_parallel_size = {split}"
    for name, size in sizes.items():
        if size & (size - 1):
            yield f"{name} that is a power of two, not {size}"
