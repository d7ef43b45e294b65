"""The order of samples does not depend on the layout, and a resumed run goes on where it was."""

from __future__ import annotations

import random

import pytest

from megatron_kanana.data.loader import MicrobatchSampler


def global_batches(
    consumed: int, total: int, global_batch: int, micro_batch: int, data_parallel_size: int
) -> list[set[int]]:
    """Sample numbers of each step, put together from every rank's microbatches."""
    microbatches = global_batch // (micro_batch * data_parallel_size)
    batches: list[set[int]] = [set() for _ in range((total - consumed) // global_batch)]
    for rank in range(data_parallel_size):
        sampler = MicrobatchSampler(consumed, total, micro_batch, rank, data_parallel_size)
        assert len(sampler) == len(batches) * microbatches
        for number, samples in enumerate(sampler):
            assert len(samples) == micro_batch
            batches[number // microbatches].update(samples)
    return batches


@pytest.mark.parametrize("seed", range(5))
def test_every_layout_sees_the_same_global_batches(seed: int) -> None:
    generator = random.Random(seed)
    global_batch, steps = 24, generator.randrange(1, 6)
    consumed = global_batch * generator.randrange(4)
    total = consumed + steps * global_batch
    expected = [
        set(range(start, start + global_batch)) for start in range(consumed, total, global_batch)
    ]
    for micro_batch in (1, 2, 3):
        for data_parallel_size in (1, 2, 4):
            got = global_batches(consumed, total, global_batch, micro_batch, data_parallel_size)
            assert got == expected
