"""Loss on held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .loss_weights import weigh_alike
from .metrics import local_loss_share
from .run import Model, Run, data_iterators
from .step import run_schedule


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """No gradients, no running maxima, no balancing statistics."""
    for chunk in model.chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in model.chunks:
            chunk.train()


def evaluate_both(run: Run, dataset: Any) -> tuple[float, float | None]:
    """Mean loss of the weights, and of their average where one is kept."""
    loss = evaluate(run, dataset)
    if run.weight_average is None:
        return loss, None
    with run.weight_average.in_model():
        return loss, evaluate(run, dataset)


def evaluate(run: Run, dataset: Any) -> float:
    """Mean loss, in nats a token, over `schedule.evaluation_batches` fixed global batches."""
    schedule = run.settings.schedule
    iterators = data_iterators(
        run, dataset, 0, schedule.evaluation_batches * schedule.global_batch_size
    )
    num_microbatches = run.settings.num_microbatches(dist.get_world_size())
    if run.settings.data.conversations:
        iterators = weigh_alike(run, iterators, schedule.evaluation_batches * num_microbatches)
    with evaluation_mode(run):
        losses: list[torch.Tensor] = []
        for _ in range(schedule.evaluation_batches):
            losses += run_schedule(run, iterators, num_microbatches, forward_only=True)
    share = local_loss_share(losses, run.device.torch_device)
    dist.all_reduce(share)
    return float(share)
