"""Sizes that csrc's kernels for norms and the embedding's gradient take."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_kanana.native_library import HOPPER_MAX_NORM_WIDTH, HOPPER_NORM_WIDTH_UNIT

from .schema import Settings


def norm_limits_passed(settings: Settings) -> Iterator[str]:
    """What of the settings the kernels do not take, as '… a multiple of 8, not …'."""
    model, unit, most = settings.model, HOPPER_NORM_WIDTH_UNIT, HOPPER_MAX_NORM_WIDTH
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.q_lora_rank": model.q_lora_rank or unit,
        "model.kv_lora_rank": model.kv_lora_rank,
    }
    for name, width in widths.items():
        if width % unit or width > most:
            yield f"{name} that is a multiple of {unit} up to {most}, not {width}"
