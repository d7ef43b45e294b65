"""Times of several functions on one GPU, taken in turns, so that a clock that drifts hits all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

FLUSHED_BYTES = 256 * 2**20  # several times the second-level cache
HEAD_START_CYCLES = 20_000_000  # about 10 ms, in which the host gets ahead of the GPU


def interleaved_ms(
    functions: Mapping[str, Callable[[], object]], rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each function in each round: a round's is the median of its repeats.

    The cache is flushed before each repeat. Every round begins with another function.
    """
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            events = [
                [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)
            ]
            torch.cuda._sleep(HEAD_START_CYCLES)
            for start, stop in events:
                flushed.zero_()
                start.record()
                functions[name]()
                stop.record()
            torch.cuda.synchronize()
            times[name].append(
                statistics.median(start.elapsed_time(stop) for start, stop in events)
            )
    return times
