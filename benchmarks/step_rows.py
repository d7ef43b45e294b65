"""What is said about a training step: rows of a card, and what its goals are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .card import Row
from .step_bench import MEGATRON, OURS
from .step_profile import StepProfile

GIB = 2**30
Times = Mapping[str, list[float]]


@dataclass(frozen=True)
class Goal:
    """A smallest ratio of times, the peer's over ours."""

    size: str
    ours: str
    peer: str
    must: float
    goal: float


BF16 = f"{OURS}, bf16"
GOALS = (
    Goal("2 x 4096", BF16, f"{MEGATRON}, bf16", 1.8, 2.6),
    Goal("8 x 4096", BF16, f"{MEGATRON}, bf16", 1.12, 1.35),
    *(
        Goal("8 x 4096", f"{OURS}, {fp8}", peer, must, goal)
        for fp8 in ("fp8_blockwise", "fp8_blockwise_experts", "fp8_blockwise_output_layer")
        for peer, must, goal in (
            (BF16, 1.15, 1.4),
            (f"{MEGATRON}, bf16", 1.3, 1.8),
            (f"{MEGATRON}, fp8_blockwise", 1.3, 1.8),
        )
    ),
)
MEMORY_MUST, MEMORY_GOAL = 0.65, 0.45  # of megatron-core's
IDLE_SIZE, IDLE_MUST, IDLE_GOAL = "2 x 4096", 0.07, 0.02


def time_rows(
    label: str, times: Times, memory: Mapping[str, int], operations: float, tokens: int
) -> list[Row]:
    """Each contender's time, rate, tokens and memory; ours beside each of megatron-core's."""
    rows = []
    for name, seconds in times.items():
        median, runs = statistics.median(seconds), len(seconds)
        prefix = f"{label}, {name}"
        rows += [
            Row(f"{prefix}: step", "ms", 1000 * median, runs=runs),
            Row(f"{prefix}: rate", "TFLOP/s", operations / median / 1e12, runs=runs),
            Row(f"{prefix}: speed", "tokens/s", tokens / median, runs=runs),
        ]
        if name in memory:
            rows.append(Row(f"{prefix}: activation memory", "GiB", memory[name] / GIB))
        for peer in times:
            if name.startswith(OURS) and peer.startswith(MEGATRON):
                values = 1000 * median, peer, 1000 * statistics.median(times[peer])
                rows.append(Row(f"{prefix}: step", "ms", *values, ratio(times, name, peer), runs))
    return rows


def component_rows(label: str, profiles: Mapping[str, StepProfile]) -> list[Row]:
    """Milliseconds by component, launches and idle time of each contender."""
    rows = []
    for name, found in profiles.items():
        prefix = f"{label}, {name}"
        rows += [
            Row(f"{prefix}: {component}", "ms", value)
            for component, value in found.components.items()
        ]
        rows.append(Row(f"{prefix}: launches", "launches", found.launches))
        rows.append(Row(f"{prefix}: idle", "% of the profiled steps", 100 * found.idle))
    return rows


def ratio(times: Times, ours: str, peer: str) -> float:
    """The peer's time over ours, the median over rounds."""
    return statistics.median(b / a for a, b in zip(times[ours], times[peer], strict=True))


def loss_rows(label: str, losses: Mapping[str, float]) -> list[Row]:
    """Losses of the same microbatch and weights."""
    return [
        Row(f"{label}, {name}: loss of the same tokens", "nats", loss)
        for name, loss in losses.items()
    ]


def verdicts(
    size: str,
    label: str,
    times: Times,
    memory: Mapping[str, int],
    profiles: Mapping[str, StepProfile],
) -> list[str]:
    """What the goals of this size of a microbatch came to."""
    lines = []
    for each in GOALS:
        if each.size == size and each.ours in times and each.peer in times:
            found = ratio(times, each.ours, each.peer)
            reached = _reached(found >= each.goal, found >= each.must)
            limits = f"(must {each.must}, goal {each.goal})"
            lines.append(
                f"{label}: {each.ours} beside {each.peer}: {found:.3f} {limits}: {reached}"
            )
    peer = f"{MEGATRON}, bf16"
    for name in memory:
        if name.startswith(OURS) and peer in memory:
            part = memory[name] / memory[peer]
            reached = _reached(part <= MEMORY_GOAL, part <= MEMORY_MUST)
            limits = f"(must {MEMORY_MUST}, goal {MEMORY_GOAL})"
            lines.append(
                f"{label}: {name}: activation memory over megatron-core's in bf16: {part:.3f}"
                f" {limits}: {reached}"
            )
    if size == IDLE_SIZE:
        for name, found_profile in profiles.items():
            idle = found_profile.idle
            reached = _reached(idle <= IDLE_GOAL, idle <= IDLE_MUST)
            limits = f"(must {IDLE_MUST:.0%}, goal {IDLE_GOAL:.0%})"
            lines.append(f"{label}: {name}: GPU idle {idle:.1%} {limits}: {reached}")
    return lines


def _reached(goal: bool, must: bool) -> str:
    return "goal" if goal else "must" if must else "MISSED"
