"""Which process orthogonalises which weight: by cost, longest first, in rounds."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def orthogonalization_cost(shapes: Sequence[tuple[int, int, int]]) -> int:
    """Floating-point operations of one iteration on matrices of `shapes`, (number, rows, columns).

    With n the shorter and m the longer side: X X^T and the product with X take 2 n^2 m each, the
    square of X X^T takes 2 n^3.
    """
    total = 0
    for number, rows, columns in shapes:
        short, long = min(rows, columns), max(rows, columns)
        total += number * (4 * short * short * long + 2 * short**3)
    return total


def assign(costs: Sequence[int], num_processes: int) -> list[int]:
    """Process of each task: the longest task first, to whoever has least to do.

    Its longest sum is at most 4/3 - 1 / (3 num_processes) times the best possible one (Graham,
    "Bounds on multiprocessing timing anomalies", 1969). The result depends on the arguments alone,
    so every process finds the same.
    """
    load = [(0, process) for process in range(num_processes)]
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        total, process = heapq.heappop(load)
        owners[task] = process
        heapq.heappush(load, (total + costs[task], process))
    return owners


def rounds(
    owners: Sequence[int], sizes: Sequence[int], order: Sequence[int], limit: int
) -> list[list[int]]:
    """Tasks of each round: in every round, a process has at most `limit` elements, or one task.

    Args:
        owners: process of each task.
        sizes: elements of each task.
        order: the tasks in the order in which a process should take its own.
        limit: elements a process holds in one round.
    """
    result: list[list[int]] = []
    round_of: dict[int, int] = {}
    filled: dict[int, int] = {}
    for task in order:
        owner, size = owners[task], sizes[task]
        if owner not in round_of:
            round_of[owner], filled[owner] = 0, 0
        elif filled[owner] + size > limit:
            round_of[owner], filled[owner] = round_of[owner] + 1, 0
        filled[owner] += size
        while len(result) <= round_of[owner]:
            result.append([])
        result[round_of[owner]].append(task)
    return result
