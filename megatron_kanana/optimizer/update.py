"""megatron-core's optimizer step in two halves, between which a step can still be refused."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch.nn.utils import get_total_norm

from .flat_shards import members


def gradient_norm_and_loss(optimizer: Any, loss_share: torch.Tensor) -> tuple[float, float]:
    """Hand the reduced gradients to the optimizer; their global norm before clipping, and the loss.

    Both are the same on every process, by one collective over all of them; every process must call
    this. The norm is not finite if any gradient of any process is not. It is that of
    megatron-core's `get_grad_norm`, which waits for the device at every tensor where neither
    Transformer Engine nor Apex is installed.

    Args:
        loss_share: fp64 []; this process's part of the loss, whose parts add up to it.
    """
    found_nonfinite = optimizer.prepare_grads()
    gradients = []
    for member in members(optimizer):
        gradients += member.get_main_grads_for_grad_norm()
    norm = get_total_norm(gradients).to(loss_share)
    sums = torch.stack([norm.square(), loss_share])
    dist.all_reduce(sums)  # every process holds its own part of the gradients
    square, loss = sums.tolist()
    return math.nan if found_nonfinite else math.sqrt(square), loss


def update_weights(optimizer: Any, norm: float) -> None:
    """Clip the gradients by their norm, as the optimizer's configuration asks, and step."""
    for member in members(optimizer):
        parameters = member.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, member.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
