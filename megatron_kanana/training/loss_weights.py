"""Weighing every token of a global batch alike, however many each microbatch trains on."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from .run import DataIterators, Run


def weigh_alike(run: Run, iterators: DataIterators, num_microbatches: int) -> DataIterators:
    """The next microbatches of each iterator, with a `loss_weight` beside their tensors.

    With it the mean over microbatches and data-parallel processes, which megatron-core's schedules
    take, is the mean over all tokens whose `loss_mask` is one. Means of each microbatch would give
    a token among few more weight. One collective; every process must call this.

    Args:
        run: says where tensors lie.
        iterators: all over the same microbatches, none of them None.
        num_microbatches: forward passes of this process in the batch.
    """
    taken: list[list[dict[str, Any]]] = [
        list(itertools.islice(iterator, num_microbatches)) for iterator in iterators
    ]
    count = torch.stack([batch["loss_mask"].sum() for batch in taken[0]]).sum()
    count = count.to(run.device.torch_device, torch.float64)
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
    parts = num_microbatches * parallel_state.get_data_parallel_world_size()
    weight = (parts / count.clamp(min=1.0)).float()
    return [iter([{**batch, "loss_weight": weight} for batch in batches]) for batches in taken]
