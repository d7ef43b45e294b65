"""Microbatches for one process: the order of samples, and where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Microbatch = dict[str, torch.Tensor]


class MicrobatchSampler:
    """Sample numbers of this process's microbatches.

    Samples are numbered over the whole run. Step by step and microbatch by microbatch, each
    data-parallel rank takes the next `micro_batch_size` of them, so a global batch holds the same
    samples in every layout, and the number of samples consumed is the whole data position.

    Args:
        consumed_samples: samples that earlier steps have used.
        total_samples: samples of the whole run.
        micro_batch_size: sequences of one microbatch.
        data_parallel_rank, data_parallel_size: place of this process.
    """

    def __init__(
        self,
        consumed_samples: int,
        total_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        first = consumed_samples + data_parallel_rank * micro_batch_size
        self._starts = range(first, total_samples, micro_batch_size * data_parallel_size)
        self._micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, start + self._micro_batch_size))


def microbatches(
    dataset: Any, sampler: MicrobatchSampler, num_workers: int
) -> Iterator[Microbatch]:
    """Batches of tokens, labels, loss_mask and position_ids, each [micro batch, sequence]."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the global one stays where it is
    )
    return iter(loader)
