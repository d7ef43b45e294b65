"""Times of several functions on a CPU, taken in turns, so that a machine's pace hits all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

from .card import Row

LEAST_SECONDS = 0.02  # of one measurement; short calls are repeated


def interleaved_ms(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each in each round; every round begins with another function."""
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = math.ceil(LEAST_SECONDS / (time.perf_counter() - start))
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                functions[name]()
            times[name].append((time.perf_counter() - start) * 1e3 / repeats[name])
    return times


def rows_in_turns(
    case: str, ours: str, by_name: Mapping[str, Mapping[str, Callable[[], object]]], rounds: int
) -> list[Row]:
    """One row for each direction and peer, of the medians in milliseconds.

    Args:
        case: begins the rows' names.
        ours: name of what is compared with all others.
        by_name: of each contender its directions, the same for all, and what runs them.
        rounds: of turns.
    """
    rows = []
    for direction in by_name[ours]:
        times = interleaved_ms({name: own[direction] for name, own in by_name.items()}, rounds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        own = medians.pop(ours)
        for peer, other in medians.items():
            rows.append(Row(f"{case}: {direction}", "ms", own, peer, other, other / own, rounds))
    return rows
