"""Where a step's time on the GPU goes: kernels by component, launches, and time without any."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

COMPONENTS = {
    "routing, permutation, combination": (
        r"route|topk|moe_|permut|combine_|scan_|count_|place_|grad_weights|row_id|sort|fused_score"
    ),
    "attention": r"flash|fmha|attention|sdpa|cudnn|::forward_kernel|::backward_.*kernel",
    "experts": r"row_matmul|weight_gradient_kernel|[Gg]rouped|group_gemm",
    "dense products": r"nvjet|gemm|cutlass|xmma|matmul|splitK|cublas",
    "loss": r"cross_entropy|statistics_kernel|gradient_kernel|softmax|nll",
    "casts to fp8": r"quantize|cast_transpose|fp8|amax|transpose_kernel|block_scal",
    "norms": r"norm",
    "rotary embedding": r"rotary|rope",
    "activation": r"swiglu|silu|gelu|dswiglu",
    "copies and sums": r"copy|cat|add|memcpy|memset|fill|elementwise|reduce|index",
}
"""Kernels by the first pattern in this order that their name matches; the rest is 'other'."""


@dataclass(frozen=True)
class StepProfile:
    """One step's work on the GPU, the mean over the profiled steps.

    Attributes:
        components: milliseconds of kernels by component.
        launches: kernels, copies and fills.
        busy: milliseconds in which something ran.
        span: milliseconds from the first kernel of the first step to the last one's end, a step.
    """

    components: dict[str, float]
    launches: float
    busy: float
    span: float

    @property
    def idle(self) -> float:
        """Part of the span in which nothing ran."""
        return 1.0 - self.busy / self.span


def profile_steps(
    step: Callable[[], object], steps: int, trace: Path | None = None, table: bool = False
) -> StepProfile:
    """Profile steps that follow each other without a wait of the host.

    The host's operations are recorded for the trace alone, as that takes the host's time.

    Args:
        trace: write a trace for chrome://tracing or ui.perfetto.dev there.
        table: print each kernel's time.
    """
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        _record(step, steps, ProfilerActivity.CPU).export_chrome_trace(str(trace))
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in _record(step, steps).events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    if table:
        print(kernel_table(events, steps), flush=True)
    return summarize(events, steps)


def _record(step: Callable[[], object], steps: int, *more: ProfilerActivity) -> profile:
    step()
    torch.cuda.synchronize()
    profiler: profile
    with profile(activities=[ProfilerActivity.CUDA, *more]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return profiler


def summarize(events: Sequence[tuple[str, float, float]], steps: int) -> StepProfile:
    """Name, start and end in microseconds of everything that ran on the GPU -> a step's profile.

    Raises:
        ValueError: nothing ran.
    """
    if not events:
        raise ValueError("nothing ran on the GPU")
    components = dict.fromkeys([*COMPONENTS, "other"], 0.0)
    for name, start, end in events:
        components[component_of(name)] += (end - start) / 1000 / steps
    first, last = min(start for _, start, _ in events), max(end for _, _, end in events)
    return StepProfile(
        {name: time for name, time in components.items() if time > 0},
        len(events) / steps,
        covered([(start, end) for _, start, end in events]) / 1000 / steps,
        (last - first) / 1000 / steps,
    )


def component_of(kernel: str) -> str:
    """The component that a kernel's name tells of."""
    for component, pattern in COMPONENTS.items():
        if re.search(pattern, kernel):
            return component
    return "other"


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kernel_table(events: Sequence[tuple[str, float, float]], steps: int) -> str:
    """A line for each kernel: milliseconds and launches a step, component, name."""
    by_name: dict[str, list[float]] = {}
    for name, start, end in events:
        by_name.setdefault(name, []).append((end - start) / 1000)
    lines = [
        f"{sum(times) / steps:9.3f} ms {len(times) / steps:7.1f} x  {component_of(name):34s} "
        + name[:140]
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ]
    return "\n".join(lines)


def plot_components(profiles: Mapping[str, StepProfile], path: Path) -> None:
    """Bars of each contender's step by component; what is idle is a component of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.8 * len(profiles)))
    names = list(profiles)
    left = [0.0] * len(names)
    tab20 = pyplot.get_cmap("tab20")
    colors = {name: tab20(index) for index, name in enumerate([*COMPONENTS, "other"])}
    for component in [*COMPONENTS, "other", "idle"]:
        widths = [_milliseconds(profiles[name], component) for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, label=component, color=colors.get(component, "0.9"))
            left = [sum(pair) for pair in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def _milliseconds(found: StepProfile, component: str) -> float:
    if component == "idle":
        return found.span - found.busy
    return found.components.get(component, 0.0)
