"""One optimizer step through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

from megatron_kanana.kernels.attention import documents_of
from megatron_kanana.model.context_parallel import part_of_batch, sum_over_group
from megatron_kanana.model.multi_token import take_mtp_losses
from megatron_kanana.model.segments import padding_mask
from megatron_kanana.optimizer.update import update_weights

from .guards import ROLLBACK, STOP, Trouble
from .loss_weights import weigh_alike
from .run import DataIterators, Run


@dataclass
class StepResult:
    """What one step gave on this process.

    Attributes:
        loss: mean over the global batch, in nats a token, of the next token alone.
        mtp_losses: fp32 [num_mtp_layers], mean over the microbatches of each multi-token
            prediction layer's loss; None without such layers and where the output layer is not.
        grad_norm: global norm of the gradients before clipping.
        troubles: what the guards found; the same on every process.
        applied: whether the weights were updated.
    """

    loss: float
    mtp_losses: torch.Tensor | None
    grad_norm: float
    troubles: list[Trouble]
    applied: bool

    @property
    def ends_here(self) -> bool:
        """Whether the run is not to go on from this step, which then does not count as done."""
        return any(trouble.action in (ROLLBACK, STOP) for trouble in self.troubles)


def train_step(run: Run, iterators: DataIterators) -> StepResult:
    """Forward and backward passes of a global batch, gradient reduction, and the update.

    The step with number k (from 1) uses the learning rate the schedule gives for k. The guards may
    keep it from the update; its samples are passed over then.
    """
    batch_size = run.global_batch_size
    num_microbatches = run.settings.num_microbatches(dist.get_world_size(), batch_size)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    if run.settings.data.conversations:
        iterators = weigh_alike(run, iterators, num_microbatches)
    forward_backward = partial(
        run_schedule, run, num_microbatches=num_microbatches, forward_only=False
    )
    passed = run.guards.run_pass(run, iterators, forward_backward)
    mtp_losses = take_mtp_losses(num_microbatches)
    result = StepResult(passed.loss, mtp_losses, passed.grad_norm, passed.troubles, passed.applies)
    if result.ends_here:
        return result
    run.scheduler.step(increment=1)
    end = run.consumed_samples + batch_size
    if result.applied:
        if run.qk_clip is not None:
            run.qk_clip.max_logits = run.attention_logits.reduce()
        update_weights(run.optimizer, result.grad_norm)
        clear_aux_losses_tracker()
    else:
        run.skipped_samples.append((run.consumed_samples, end))
    run.step += 1
    if run.weight_average is not None:
        run.weight_average.update(run.step)
    run.consumed_samples = end
    return result


def run_schedule(
    run: Run, iterators: DataIterators, num_microbatches: int, *, forward_only: bool
) -> list[torch.Tensor]:
    """Run microbatches through the pipeline; each one's mean loss, on the last stage.

    Under context parallelism it is this process's part, and the parts add up to the mean.
    """
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
    segment_ids = batch.get("segment_ids")
    documents = None if segment_ids is None else documents_of(segment_ids)  # of whole sequences
    batch = part_of_batch(batch)
    mask, weight = batch["loss_mask"], batch.get("loss_weight")
    options = {}
    if segment_ids is not None:
        options["padding_mask"] = padding_mask(batch["segment_ids"], chunk)
    if weight is not None and run.config.mtp_num_layers:
        options["loss_weight"] = weight
    out = chunk(
        batch["tokens"],
        batch["position_ids"],
        documents,  # the attention mask, which our core attention takes in this form
        labels=batch["labels"],
        loss_mask=mask,
        **options,
    )
    return out, partial(masked_loss, mask, weight)


def masked_loss(
    loss_mask: torch.Tensor, weight: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a microbatch, for the schedule and for us; this process's part of it.

    Parts add up over context parallelism: megatron-core's schedules multiply them by its size, and
    its data parallelism averages over it.

    Args:
        loss_mask: [batch, sequence], one where a token counts.
        weight: of each token; None takes the mean over those that count.
        losses: [batch, sequence].
    """
    total = (losses.float() * loss_mask).sum()
    if weight is None:
        loss = total / sum_over_group(loss_mask.sum()).clamp(min=1.0)
    else:
        loss = total * weight
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place


def _unused_loss(_: torch.Tensor) -> Any:
    raise AssertionError("the schedule computes losses on the last stage only")
