"""Sizes that csrc's kernels for norms and the embedding's gradient take."""

from __future__ import annotations

from collections.abc import Iterator

from .schema import Settings

WIDTH_UNIT, MAX_WIDTH = 8, 16384
"""As in csrc/kernels/rms_norm.h."""


def norm_limits_passed(settings: Settings) -> Iterator[str]:
    """What of the settings the kernels do not take, as '… a multiple of 8, not …'."""
    model = settings.model
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.q_lora_rank": model.q_lora_rank or WIDTH_UNIT,
        "model.kv_lora_rank": model.kv_lora_rank,
    }
    for name, width in widths.items():
        if width % WIDTH_UNIT or width > MAX_WIDTH:
            yield f"{name} that is a multiple of {WIDTH_UNIT} up to {MAX_WIDTH}, not {width}"
