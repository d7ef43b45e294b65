"""Batch sizes that change with the tokens: which step has which size, and which samples."""

from __future__ import annotations

import pytest

from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.config.batch_sizes import global_batch_size, samples_of_steps
from megatron_kanana.data.loader import MicrobatchSampler

LENGTH = 128
CHANGES = ((2500, 24), (2501, 32), (20_000, 64), (20_480, 8))


def settings(changes: tuple[tuple[int, int], ...] = CHANGES) -> Settings:
    """A run that begins with 16 sequences of 128 tokens."""
    entries = ",".join(f"{{tokens:{at},global_batch_size:{size}}}" for at, size in changes)
    words = [f"data.sequence_length={LENGTH}", "schedule.global_batch_size=16"]
    return load_settings([*words, f"schedule.batch_size_changes=[{entries}]"], Environment())


def sizes_step_by_step(steps: int) -> list[int]:
    """The sizes of the first steps, written down plainly."""
    sizes: list[int] = []
    for _ in range(steps):
        size = 16
        for at, later in CHANGES:
            if sum(sizes) * LENGTH >= at:
                size = later
        sizes.append(size)
    return sizes


def test_sizes_are_those_of_a_plain_count() -> None:
    run, wanted = settings(), sizes_step_by_step(40)
    assert set(wanted) == {8, 16, 32}  # 24 and 64 would begin and end within one step
    for step in range(41):
        before = sum(wanted[:step])
        assert samples_of_steps(run, step) == before
        assert samples_of_steps(run, 40 - step, before) == sum(wanted) - before
        if step < 40:
            assert global_batch_size(run, before) == wanted[step]


def test_without_changes_every_step_has_one_size() -> None:
    run = settings(())
    assert [global_batch_size(run, samples) for samples in (0, 16, 10**9)] == [16, 16, 16]
    assert samples_of_steps(run, 10**6) == 16 * 10**6
    assert samples_of_steps(run, 7, 48) == 7 * 16


def test_kanana_2s_change_comes_after_200_billion_tokens() -> None:
    run = settings()
    run.data.sequence_length, run.schedule.global_batch_size = 4096, 2048
    run.schedule.batch_size_changes = run.schedule.batch_size_changes[:1]
    (change,) = run.schedule.batch_size_changes
    change.tokens, change.global_batch_size = 200e9, 8192
    small = -(-200_000_000_000 // (2048 * 4096))
    assert samples_of_steps(run, small + 1000) == small * 2048 + 1000 * 8192
    assert global_batch_size(run, (small - 1) * 2048) == 2048
    assert global_batch_size(run, small * 2048) == 8192


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 4), (4, 2)])
def test_a_step_has_the_same_samples_in_every_layout(ranks: int, micro: int) -> None:
    wanted = sizes_step_by_step(30)
    samplers = [iter(MicrobatchSampler(0, sum(wanted), micro, r, ranks)) for r in range(ranks)]
    first = 0
    for size in wanted:
        samples = [
            sample
            for sampler in samplers
            for _ in range(size // (micro * ranks))
            for sample in next(sampler)
        ]
        assert sorted(samples) == list(range(first, first + size))
        first += size
    assert all(next(sampler, None) is None for sampler in samplers)
