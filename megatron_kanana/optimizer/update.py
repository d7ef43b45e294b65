"""megatron-core's optimizer step in two halves, between which a step can still be refused."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from .flat_shards import members


def gradient_norm(optimizer: Any) -> float:
    """Hand the reduced gradients to the optimizer; their global norm before clipping.

    It is the same on every process, and not finite if any gradient of any process is not.
    """
    found_nonfinite = optimizer.prepare_grads()
    return math.nan if found_nonfinite else float(optimizer.get_grad_norm())


def update_weights(optimizer: Any, norm: float) -> None:
    """Clip the gradients by their norm, as the optimizer's configuration asks, and step."""
    for member in members(optimizer):
        parameters = member.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, member.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
