"""Attention beside its peers on one GPU: forward and backward alone, in interleaved rounds.

python -m benchmarks.attention --name attention_h200
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .attention_peers import (
    CONTENDERS,
    FA4,
    FA4_DETERMINISTIC,
    FLEX,
    FLEX_DETERMINISTIC,
    FLEX_PLAIN,
    OURS,
    OURS_DETERMINISTIC,
    OURS_PLAIN,
    SDPA,
    TE,
    TE_PLAIN,
    Case,
    Inputs,
    random_inputs,
)
from .card import Row, reason, write_card
from .interleaved import interleaved_ms

WARM_UP = 3
FORWARD = (OURS, OURS_PLAIN, FLEX, FLEX_PLAIN, FA4, TE, TE_PLAIN, SDPA)
BACKWARD = (
    OURS,
    OURS_DETERMINISTIC,
    FLEX_PLAIN,
    FLEX_DETERMINISTIC,
    FA4,
    FA4_DETERMINISTIC,
    TE_PLAIN,
    SDPA,
)
# sequence, batch, query heads, key heads, query-key width, value width
CASES = (
    Case(4096, 2, 32, 32, 192, 128),
    Case(8192, 1, 32, 32, 192, 128),
    Case(4096, 2, 32, 32, 128, 128),
    Case(4096, 2, 32, 32, 64, 64),
)
JUDGED = CASES[:2]  # the training shape of MLA; the others are for information


@dataclass(frozen=True)
class Goal:
    """What a case of `JUDGED` is measured by.

    Attributes:
        ours: the contender of this project.
        peers: it is compared with the fastest of these that ran.
        must, goal: smallest time of the peer / ours.
    """

    subject: str
    direction: str
    ours: str
    peers: tuple[str, ...]
    must: float
    goal: float


GOALS = (
    Goal("forward with max logits", "forward", OURS, (FLEX,), 0.90, 1.05),
    Goal("forward with max logits", "forward", OURS, (TE,), 1.08, 1.25),
    Goal("cost of max logits", "forward", OURS, (OURS_PLAIN,), 1 / 1.01, 1 / 1.003),
    Goal("backward", "backward", OURS, (FA4, FLEX_PLAIN, SDPA), 0.85, 1.05),
)


def label(case: Case) -> str:
    """Sizes of a case."""
    return (
        f"B{case.batch} S{case.length}, {case.query_heads} heads, {case.width}/{case.value_width}, "
        f"{'causal' if case.causal else 'no mask'}"
    )


def floating_point_operations(case: Case, direction: str) -> float:
    """Of the matrix products; half of them under a causal mask."""
    pairs = case.batch * case.query_heads * case.length**2 * (0.5 if case.causal else 1.0)
    products = case.width + case.value_width
    if direction == "backward":  # logits and dQ, dK of the one width; dP and dV of the other
        products = 3 * case.width + 2 * case.value_width
    return 2 * products * pairs


def prepare(
    case: Case, inputs: Inputs, direction: str, names: Sequence[str]
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """What is timed, by contender, warmed up; and why others do not run."""
    laid_out = {first: inputs.laid_out(batch_first=first) for first in (False, True)}
    functions: dict[str, Callable[[], object]] = {}
    not_run = []
    for name in names:
        contender = CONTENDERS[name]
        tensors = laid_out[contender.batch_first]
        try:
            function: Callable[[], object] = partial(contender.build(case), *tensors.leaves)
            if direction == "backward":
                out, _ = contender.build(case)(*tensors.leaves)
                function = partial(
                    torch.autograd.grad, out, tensors.leaves, tensors.grad_out, retain_graph=True
                )
            for _ in range(WARM_UP):
                function()
            torch.cuda.synchronize()
        except Exception as error:  # whatever a peer raises, the others run
            not_run.append(f"not run: {name}, {label(case)}, {direction}: {reason(error)}")
            print(not_run[-1], flush=True)
            continue
        functions[name] = function
    return functions, not_run


def measure(
    case: Case, direction: str, rounds: int, repeats: int
) -> tuple[dict[str, list[float]], list[str]]:
    """Milliseconds of each contender in each round, and why others did not run."""
    names = FORWARD if direction == "forward" else BACKWARD
    functions, not_run = prepare(case, random_inputs(case), direction, names)
    times = interleaved_ms(functions, rounds, repeats)
    functions.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return times, not_run


def ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """The peer's time over ours, the median over rounds."""
    return statistics.median(b / a for a, b in zip(ours, peer, strict=True))


def rows_of(case: Case, direction: str, times: dict[str, list[float]]) -> list[Row]:
    """Each of ours beside each peer."""
    operations = floating_point_operations(case, direction)
    rows = []
    for name, found in times.items():
        median = statistics.median(found)
        spread = statistics.quantiles(found, n=10) if len(found) > 1 else [median, median]
        print(
            f"{direction:8s} {label(case):42s} {name:46s} {median:8.4f} ms "
            f"({spread[0]:.4f} to {spread[-1]:.4f}) {operations / median / 1e9:6.0f} TFLOP/s",
            flush=True,
        )
        teraflops = operations / median / 1e9
        rows.append(
            Row(f"{direction}, {label(case)}: {name}", "TFLOP/s", teraflops, runs=len(found))
        )
        if name.startswith("ours"):
            for peer, values in times.items():
                if peer != name and not (peer.startswith("ours") and name != OURS):
                    rows.append(
                        Row(
                            f"{direction}, {label(case)}: {name}",
                            "ms",
                            median,
                            peer,
                            statistics.median(values),
                            ratio(found, values),
                            len(found),
                        )
                    )
    return rows


def verdicts(case: Case, direction: str, times: dict[str, list[float]]) -> list[str]:
    """Each goal of this direction: what was found, and whether it is enough."""
    found = []
    for goal in GOALS:
        if goal.direction != direction:
            continue
        peers = [peer for peer in goal.peers if peer in times]
        what = f"{goal.subject}, {label(case)}"
        if goal.ours not in times or not peers:
            found.append(f"{what}, beside {' or '.join(goal.peers)}: not measured")
            continue
        best = min(peers, key=lambda peer: statistics.median(times[peer]))
        reached = ratio(times[goal.ours], times[best])
        verdict = "goal" if reached >= goal.goal else "must" if reached >= goal.must else "BELOW"
        found.append(
            f"{what}, beside {best}: {reached:.4f} (must {goal.must:.4g}, goal {goal.goal:.4g}): "
            f"{verdict}"
        )
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="write benchmarks/results/NAME.json")
    parser.add_argument("--output", type=Path, help="folder of the card instead")
    parser.add_argument("--rounds", type=int, default=25, help="how often all take their turn")
    parser.add_argument("--repeats", type=int, default=8, help="calls a turn")
    parser.add_argument("--judged", action="store_true", help="the training shape of MLA alone")
    arguments = parser.parse_args()
    rows: list[Row] = []
    notes = [
        "FLOPs are those of the matrix products: causal forward B*H*S*S*(width + value width), "
        "backward B*H*S*S*(3*width + 2*value width). A turn is the median of "
        f"{arguments.repeats} calls, cache flushed before each; a ratio is the median over rounds."
    ]
    for case in JUDGED if arguments.judged else CASES:
        for direction in ("forward", "backward"):
            times, not_run = measure(case, direction, arguments.rounds, arguments.repeats)
            rows += rows_of(case, direction, times)
            notes += not_run
            if case in JUDGED:
                notes += verdicts(case, direction, times)
                print("\n".join(verdicts(case, direction, times)), flush=True)
    if arguments.name:
        folder = {"results_dir": arguments.output} if arguments.output else {}
        print(write_card(arguments.name, rows, notes=notes, **folder))


if __name__ == "__main__":
    main()
