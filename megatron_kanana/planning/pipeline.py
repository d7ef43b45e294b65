"""megatron-core's pipeline schedules: their order, what they keep in memory, how long they wait.

1F1B and its interleaved form (Narayanan et al., 2021, arXiv 2104.04473), in the order in which
megatron-core 0.16.1 runs them. With p stages of v interleaved parts, m microbatches and equal
stages, the pipeline is idle for (p - 1) / (v m) of the time it works.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

STEADY = 3
"""After so many times `pipeline` microbatches every schedule has been in its steady state."""


@dataclass(frozen=True)
class Pass:
    """One pass of one microbatch through one virtual stage.

    Attributes:
        forward: or else backward.
        chunk: number of the virtual stage on its process.
        microbatch: number of the microbatch.
    """

    forward: bool
    chunk: int
    microbatch: int


@functools.lru_cache(maxsize=4096)
def order(rank: int, pipeline: int, virtual: int, microbatches: int) -> tuple[Pass, ...]:
    """The passes of a pipeline rank, in their order.

    Args:
        rank: of the `pipeline` ranks.
        virtual: interleaved stages on a rank; above 1, `microbatches` is a multiple of `pipeline`.
        microbatches: of the step.
    """
    total = microbatches * virtual
    if virtual == 1:
        warm_up = pipeline - rank - 1
    else:
        warm_up = 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline
    warm_up = min(warm_up, total)
    forwards = [_pass(True, index, pipeline, virtual) for index in range(total)]
    backwards = [_pass(False, index, pipeline, virtual) for index in range(total)]
    result = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        result += [forward, backward]
    return (*result, *backwards[total - warm_up :])


def _pass(forward: bool, index: int, pipeline: int, virtual: int) -> Pass:
    """Pass number `index` of its direction: groups of microbatches, chunk after chunk."""
    if virtual == 1:
        return Pass(forward, 0, index)
    group, place = divmod(index, pipeline * virtual)
    chunk, microbatch = divmod(place, pipeline)
    if not forward:
        chunk = virtual - 1 - chunk
    return Pass(forward, chunk, group * pipeline + microbatch)


def peak_bytes(
    rank: int,
    pipeline: int,
    virtual: int,
    microbatches: int,
    saved: Sequence[float],
    transient: Sequence[float],
) -> float:
    """Most memory of activations on a rank during a step.

    Args:
        saved: bytes that a forward pass of each virtual stage leaves for its backward pass.
        transient: bytes that a pass of each virtual stage needs for itself meanwhile.
    """
    microbatches = min(microbatches, STEADY * pipeline)
    held, peak = 0.0, 0.0
    for step in order(rank, pipeline, virtual, microbatches):
        if step.forward:
            held += saved[step.chunk]
        peak = max(peak, held + transient[step.chunk])
        if not step.forward:
            held -= saved[step.chunk]
    return peak


def makespan(
    microbatches: int,
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    message: float = 0.0,
) -> float:
    """Time from the first forward pass to the end of the last backward pass of a step.

    Every pass waits for its input and for the passes before it on its process.

    Args:
        microbatches: of the step.
        forward, backward: time of a pass, by pipeline rank and virtual stage.
        message: time between the end of a pass and the start of the next stage's.
    """
    pipeline, virtual = len(forward), len(forward[0])
    simulated = min(microbatches, STEADY * pipeline)
    # In the steady state each microbatch more takes as long as the slowest rank's passes.
    slowest = max(sum(f) + sum(b) for f, b in zip(forward, backward, strict=True))
    rest = (microbatches - simulated) * slowest
    orders = [order(rank, pipeline, virtual, simulated) for rank in range(pipeline)]
    ends: dict[tuple[bool, int, int], float] = {}  # direction, stage of all, microbatch
    clocks, places = [0.0] * pipeline, [0] * pipeline
    last = pipeline * virtual - 1
    while True:
        moved = False
        for rank in range(pipeline):
            while places[rank] < len(orders[rank]):
                step = orders[rank][places[rank]]
                stage = step.chunk * pipeline + rank
                if step.forward:
                    before = (True, stage - 1, step.microbatch) if stage else None
                elif stage == last:
                    before = (True, stage, step.microbatch)
                else:
                    before = (False, stage + 1, step.microbatch)
                if before is not None and before not in ends:
                    break
                ready = 0.0 if before is None else ends[before]
                if before is not None and before[1] != stage:
                    ready += message
                times = forward if step.forward else backward
                clocks[rank] = max(clocks[rank], ready) + times[rank][step.chunk]
                ends[step.forward, stage, step.microbatch] = clocks[rank]
                places[rank] += 1
                moved = True
        if not moved:
            break
    assert all(place == len(steps) for place, steps in zip(places, orders, strict=True))
    return max(clocks) + rest
