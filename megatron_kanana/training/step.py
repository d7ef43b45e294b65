"""One optimizer step through megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

from megatron_kanana.model.multi_token import take_mtp_losses
from megatron_kanana.model.segments import padding_mask

from .loss_weights import weigh_alike
from .run import DataIterators, Run


@dataclass
class StepResult:
    """What one step gave on this process.

    Attributes:
        losses: mean loss of each microbatch; empty on processes without the output layer.
        mtp_losses: fp32 [num_mtp_layers], mean over the microbatches of each multi-token
            prediction layer's loss; None where `losses` is empty and without such layers.
        grad_norm: global norm of the gradients before clipping; not a number for a skipped step.
        applied: whether the weights were updated.
    """

    losses: list[torch.Tensor]
    mtp_losses: torch.Tensor | None
    grad_norm: float
    applied: bool


def train_step(run: Run, iterators: DataIterators) -> StepResult:
    """Forward and backward passes of a global batch, gradient reduction, and the update.

    The step with number k (from 1) uses the learning rate the schedule gives for k.
    """
    batch_size = run.global_batch_size
    num_microbatches = run.settings.num_microbatches(dist.get_world_size(), batch_size)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    if run.settings.data.conversations:
        iterators = weigh_alike(run, iterators, num_microbatches)
    losses = run_schedule(run, iterators, num_microbatches, forward_only=False)
    run.scheduler.step(increment=1)
    if run.qk_clip is not None:
        run.qk_clip.max_logits = run.attention_logits.reduce()
    applied, grad_norm, _ = run.optimizer.step()
    clear_aux_losses_tracker()
    run.step += 1
    if run.weight_average is not None:
        run.weight_average.update(run.step)
    run.consumed_samples += batch_size
    mtp_losses = take_mtp_losses(num_microbatches)
    return StepResult(
        losses, mtp_losses, math.nan if grad_norm is None else float(grad_norm), bool(applied)
    )


def run_schedule(
    run: Run, iterators: DataIterators, num_microbatches: int, *, forward_only: bool
) -> list[torch.Tensor]:
    """Run microbatches through the pipeline; each one's mean loss, on the last stage."""
    data = run.settings.data
    several = len(run.chunks) > 1
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run),
        data_iterator=iterators if several else iterators[0],
        model=run.chunks if several else run.chunks[0],
        num_microbatches=num_microbatches,
        seq_length=data.sequence_length,
        micro_batch_size=run.settings.schedule.micro_batch_size,
        forward_only=forward_only,
    )
    return [result["loss"] for result in results]


def _forward_step(run: Run, iterator: Iterator[Any] | None, chunk: Any) -> Any:
    if iterator is None:  # a middle stage of the pipeline
        return chunk(None, None, None), _unused_loss
    batch = {
        name: tensor.to(run.device.torch_device, non_blocking=True)
        for name, tensor in next(iterator).items()
    }
    mask, weight = batch["loss_mask"], batch.get("loss_weight")
    segment_ids = batch.get("segment_ids")
    options = {}
    if segment_ids is not None:
        options["padding_mask"] = padding_mask(segment_ids, chunk)
    if weight is not None and run.config.mtp_num_layers:
        options["loss_weight"] = weight
    out = chunk(
        batch["tokens"],
        batch["position_ids"],
        segment_ids,  # the attention mask, which our core attention takes in this form
        labels=batch["labels"],
        loss_mask=mask,
        **options,
    )
    return out, partial(masked_loss, mask, weight)


def masked_loss(
    loss_mask: torch.Tensor, weight: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a microbatch, for the schedule and for us.

    Args:
        loss_mask: [batch, sequence], one where a token counts.
        weight: of each token; None takes the mean over those that count.
        losses: [batch, sequence].
    """
    total = (losses.float() * loss_mask).sum()
    loss = total / loss_mask.sum().clamp(min=1.0) if weight is None else total * weight
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place


def _unused_loss(_: torch.Tensor) -> Any:
    raise AssertionError("the schedule computes losses on the last stage only")
