"""What is said about a layer of experts: rows of a card, and what its goals are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import nn

from .card import Row
from .moe_cases import Case, Inputs, Weights, floating_point_operations, stated_bytes
from .moe_memory import Memory, kernel_table, launches, measure_memory
from .moe_peers import CONTENDERS, MEGATRON, OURS, OURS_ROUTED, PLAIN


@dataclass(frozen=True)
class Goal:
    """What the layer of 30B is measured by.

    Attributes:
        tokens: at which number of tokens; None is at all of them.
        must, goal: smallest time of the peer / ours.
    """

    ours: str
    peer: str
    tokens: int | None
    must: float
    goal: float


GOALS = (
    Goal(OURS, MEGATRON, 16384, 2.2, 3.2),
    Goal(OURS, MEGATRON, 65536, 1.2, 1.5),
    Goal(OURS_ROUTED, PLAIN, None, 1.25, 1.7),
)
RATE_TOKENS, RATE_MUST, RATE_GOAL = 65536, 460.0, 580.0  # TFLOP/s of the whole layer
PEAK_MUST, PEAK_GOAL = 0.55, 0.4  # of megatron-core's


@dataclass
class Bench:
    """A case, what it is made of, and the contenders that run.

    Attributes:
        not_run: why others do not.
    """

    case: Case
    weights: Weights
    inputs: Inputs
    layers: dict[str, nn.Module]
    not_run: list[str]

    def operations(self, name: str) -> float:
        """Floating point operations of a contender's forward and backward pass."""
        return floating_point_operations(
            self.case,
            self.inputs.rows,
            self.inputs.tokens,
            with_shared=CONTENDERS[name].with_shared,
        )


def ratio(ours: list[float], peer: list[float]) -> float:
    """The peer's time over ours, the median over rounds."""
    return statistics.median(b / a for a, b in zip(ours, peer, strict=True))


def compared(name: str, peer: str) -> bool:
    """Whether `name`, of ours, does the same work as the peer."""
    return (
        name.startswith("ours")
        and not peer.startswith("ours")
        and (CONTENDERS[name].with_shared == CONTENDERS[peer].with_shared)
    )


def time_rows(bench: Bench, times: dict[str, list[float]]) -> list[Row]:
    """Times and rates, ours beside each peer of the same work."""
    rows: list[Row] = []
    for name, found in times.items():
        median = statistics.median(found)
        spread = statistics.quantiles(found, n=10) if len(found) > 1 else [median, median]
        teraflops = bench.operations(name) / median / 1e9
        label = f"{bench.case.label}: {name}"
        print(
            f"{label:86s} {median:8.3f} ms ({spread[0]:.3f} to {spread[-1]:.3f})"
            f" {teraflops:5.0f} TFLOP/s",
            flush=True,
        )
        rows.append(Row(label, "TFLOP/s", teraflops, runs=len(found)))
        rows.append(Row(label, "ms", median, runs=len(found)))
        for peer, values in times.items():
            if compared(name, peer):
                theirs = statistics.median(values)
                rows.append(
                    Row(label, "ms", median, peer, theirs, ratio(found, values), len(found))
                )
    return rows


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a card, and what they say."""

    rows: list[Row]
    found: dict[str, Memory]


def memory_rows(bench: Bench) -> MemoryRows:
    """Bytes a token and peaks of every contender, ours beside each peer of the same work."""
    rows: list[Row] = []
    found: dict[str, Memory] = {}
    tokens = bench.inputs.tokens
    stated = stated_bytes(bench.case, bench.inputs.rows, tokens) / tokens
    for name, layer in bench.layers.items():
        try:
            memory = measure_memory(layer, bench.inputs)
        except Exception as error:  # whatever one raises, the others are measured
            bench.not_run.append(f"not run: memory of {name}: {error}"[:400])
            continue
        found[name] = memory
        print(
            f"{bench.case.label}: {name}: kept a token {memory.saved / tokens:.0f} bytes saved,"
            f" {memory.after_forward / tokens:.0f} allocated (2d + 4Kn is {stated:.0f});"
            f" peak {memory.peak / 2**30:.3f} GiB",
            flush=True,
        )
    kinds = (
        ("saved for backward", "bytes a token", "saved", tokens),
        ("allocated after forward", "bytes a token", "after_forward", tokens),
        ("peak above weights", "GiB", "peak", 2**30),
    )
    for name, memory in found.items():
        for kind, unit, attribute, scale in kinds:
            label = f"{bench.case.label}: {name}, {kind}"
            value = getattr(memory, attribute) / scale
            rows.append(Row(label, unit, value))
            for peer in (peer for peer in found if compared(name, peer)):
                theirs = getattr(found[peer], attribute) / scale
                rows.append(Row(label, unit, value, peer, theirs, theirs / value))
    return MemoryRows(rows, found)


def launch_rows(bench: Bench, *, with_tables: bool) -> list[Row]:
    """How many kernels, copies and fills each contender's pass launches.

    Args:
        with_tables: print ours by kernel.
    """
    rows: list[Row] = []
    for name, layer in bench.layers.items():
        try:
            launches(layer, bench.inputs)  # the profiler's first pass is its own
            found = launches(layer, bench.inputs)
        except Exception as error:  # whatever one raises, the others are measured
            bench.not_run.append(f"not run: launches of {name}: {error}"[:400])
            continue
        counts = [
            sum(launch.direction == direction for launch in found)
            for direction in ("forward", "backward")
        ]
        busy = sum(launch.microseconds for launch in found) / 1e3
        label = f"{bench.case.label}: {name}"
        print(f"{label:86s} launches {counts[0]} + {counts[1]}, GPU busy {busy:.3f} ms", flush=True)
        rows.append(Row(f"{label}, launches forward", "launches", counts[0]))
        rows.append(Row(f"{label}, launches backward", "launches", counts[1]))
        if with_tables and name.startswith(OURS):
            print(kernel_table(found), flush=True)
    return rows


def verdicts(bench: Bench, times: dict[str, list[float]], memory: dict[str, Memory]) -> list[str]:
    """Each goal that this case is measured by: what was found, and whether it is enough."""
    case = bench.case
    found: list[str] = []
    if case.processes > 1:
        return []

    def judge(what: str, value: float, must: float, goal: float, sign: int = 1) -> None:
        enough = [sign * value >= sign * limit for limit in (goal, must)]
        verdict = "goal" if enough[0] else "must" if enough[1] else "BELOW"
        found.append(f"{case.label}: {what}: {value:.4g} (must {must:g}, goal {goal:g}): {verdict}")

    for goal in GOALS:
        if goal.tokens in (None, case.tokens):
            if goal.ours in times and goal.peer in times:
                value = ratio(times[goal.ours], times[goal.peer])
                judge(f"{goal.ours} beside {goal.peer}", value, goal.must, goal.goal)
            else:
                found.append(f"{case.label}: {goal.ours} beside {goal.peer}: not measured")
    if OURS in times and case.tokens == RATE_TOKENS:
        rate = bench.operations(OURS) / statistics.median(times[OURS]) / 1e9
        judge("TFLOP/s of the whole layer", rate, RATE_MUST, RATE_GOAL)
    if OURS in memory and MEGATRON in memory:
        part = memory[OURS].peak / memory[MEGATRON].peak
        judge("peak memory over megatron-core's", part, PEAK_MUST, PEAK_GOAL, -1)
    if OURS_ROUTED in memory:
        kept, tokens = memory[OURS_ROUTED].saved, bench.inputs.tokens
        stated = stated_bytes(case, bench.inputs.rows, tokens)
        found.append(
            f"{case.label}: kept for backward a token, routed experts: {kept / tokens:.1f} bytes,"
            f" 2d + 4Kn is {stated / tokens:.0f}, the rest, {(kept - stated) / tokens:.1f}, routing"
        )
    return found
