"""Predictions as tables for a person and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_kanana.config.precision_settings import DENSE_WEIGHTS

from .architecture import EXPERTS, OUTPUT_LAYER
from .calibration import KANANA
from .errors import Comparison, fit_own
from .observation import GIB
from .own_cards import OURS, RATES
from .plan import Plan, RunPlan
from .search import Candidate


def plan_lines(run: RunPlan) -> Iterator[str]:
    """A whole run: memory by stage, then time and cost for each batch size."""
    first = run.plans[0][1]
    machine = first.job.machine
    yield (
        f"{first.job.layout.world_size} x {machine.name}, layers computed by"
        f" {first.job.implementation.name}{_in_fp8(first)},"
        f" attention by {first.job.implementation.attention.name},"
        f" experts by {first.job.implementation.experts.name}"
    )
    yield ""
    row = "{:>6}{:>17}{:>9}{:>11}{:>11}{:>8}{:>13}{:>8}{:>9}"
    yield "GiB on a process of each pipeline rank"
    names = ("weights", "gradients", "optimizer", "copies", "activations", "update", "peak")
    yield row.format("rank", "parameters", *names)
    for rank, memory in enumerate(first.memory):
        sizes = [getattr(memory, name) / GIB for name in names]
        parameters = sum(memory.parameters.values())
        yield row.format(rank, f"{parameters:,}", *(f"{size:.2f}" for size in sizes))
    room = machine.memory_bytes / GIB
    verdict = "fits" if first.fits else "does not fit"
    yield f"{verdict}: {first.peak_memory / GIB:.1f} of {room:.1f} GiB"
    for tokens, plan in run.plans:
        yield ""
        yield from _step_lines(tokens, plan)
    yield ""
    yield (
        f"{run.tokens / 1e12:.3g}T tokens: {run.days:.1f} days, {run.gpu_hours:,.0f} GPU-hours,"
        " without interruptions"
    )
    yield (
        f"checkpoint: {first.checkpoint_bytes / 1e12:.2f} TB, {first.checkpoint_seconds:.0f} s at"
        f" {machine.disk_bandwidth / 1e9:.0f} GB/s"
    )


def _in_fp8(plan: Plan) -> str:
    fp8 = plan.job.fp8
    if not fp8:
        return ""
    left_out = [kind for kind in DENSE_WEIGHTS if kind not in fp8]
    words = "projections" + (f" (without {', '.join(left_out)})" if left_out else "")
    more = {"experts": EXPERTS, "output layer": OUTPUT_LAYER}
    *first, last = [words, *(name for name, key in more.items() if key in fp8)]
    return f" with {', '.join(first)}{' and ' if first else ''}{last} in fp8"


def _step_lines(tokens: float, plan: Plan) -> Iterator[str]:
    layout = plan.job.layout
    yield (
        f"steps of {layout.global_batch_size:,} x {layout.sequence_length:,} tokens,"
        f" {layout.microbatches} microbatches, for {tokens / 1e9:,.0f}B tokens"
    )
    for part, seconds in sorted(plan.parts.items(), key=lambda item: -item[1]):
        if seconds >= 0.0005 * plan.step:
            yield f"  {part:<32}{seconds:>9.3f} s{seconds / plan.step:>7.1%}"
    yield f"  {'step':<32}{plan.step:>9.3f} s"
    yield (
        f"  {plan.flops_per_gpu / 1e12:.0f} TFLOP/s a GPU, {plan.utilization:.1%} of the peak;"
        f" {plan.tokens_per_second * 86400 / 1e9:,.1f}B tokens a day"
    )


def search_lines(candidates: Sequence[Candidate], top: int) -> Iterator[str]:
    """The first layouts of a search."""
    yield f"{len(candidates)} layouts fit; the fastest:"
    row = "{:>4}{:>4}{:>4}{:>5}{:>5}{:>7}{:>8}{:>10}{:>9}{:>9}{:>9}{:>7}{:>9}"
    yield row.format(
        *("TP", "PP", "VP", "EP", "mbs", "count", "again", "GiB", "step s"),
        *("TFLOP/s", "MFU", "wait", "B/day"),
    )
    for candidate in candidates[:top]:
        plan = candidate.plan
        layout = plan.job.layout
        yield row.format(
            *(layout.tensor, layout.pipeline, layout.virtual, layout.expert),
            layout.micro_batch_size,
            "yes" if layout.counts_embeddings else "no",
            candidate.settings.parallel.recompute,
            f"{plan.peak_memory / GIB:.1f}",
            f"{plan.step:.2f}",
            f"{plan.flops_per_gpu / 1e12:.0f}",
            f"{plan.utilization:.1%}",
            f"{plan.parts['waiting'] / plan.step:.1%}",
            f"{plan.tokens_per_second * 86400 / 1e9:.0f}",
        )
    if candidates:
        yield "the first: " + " ".join(candidates[0].overrides)


def comparison_lines(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Measured and predicted, as a table of Markdown."""
    with_left_out = any(each.left_out is not None for each in comparisons)
    yield TABLE_START + (" left out |" if with_left_out else "")
    yield "| --- | --- | --- | --- | --- |" + (" --- |" if with_left_out else "")
    for each in comparisons:
        observation = each.observation
        unit = UNITS[observation.quantity]
        measured = "not measured"
        error = "fitted" if observation.calibrated else ""
        if observation.measured is not None:
            measured = f"{observation.measured:.4g} {unit}"
            error = f"{each.error:+.1%}" + (", fitted" if observation.calibrated else "")
        cells = [observation.name, observation.quantity, measured]
        cells += [f"{each.predicted:.4g} {unit}", error]
        if with_left_out:
            left_out = ""
            if each.left_out is not None and observation.measured is not None:
                left_out = f"{each.left_out / observation.measured - 1:+.1%}"
            cells.append(left_out)
        yield "| " + " | ".join(cells) + " |"


def with_table(text: str, lines: Sequence[str]) -> str:
    """A document in which a table with the same first line stands in its old place.

    Raises:
        ValueError: there is no such table.
    """
    old = text.split("\n")
    starts = [index for index, line in enumerate(old) if line.startswith(TABLE_START)]
    if not starts:
        raise ValueError(f"there is no table that begins with {TABLE_START}")
    start = end = starts[0]
    while end < len(old) and old[end].startswith("|"):
        end += 1
    return "\n".join([*old[:start], *lines, *old[end:]])


def fit_lines() -> Iterator[str]:
    """Numbers of `calibration.KANANA` that fit this version's figures best, beside what it has."""
    own = [each for each in OURS if RATES in each.calibrated]
    host, host_fp8, matmul_fp8, moving = fit_own(own)
    fitted = {
        "host_layer": (KANANA.host_layer, host * KANANA.host_layer),
        "host_moe": (KANANA.host_moe, host * KANANA.host_moe),
        "host_stage": (KANANA.host_stage, host * KANANA.host_stage),
        "host_fp8": (KANANA.host_fp8, host_fp8),
        "matmul_fp8": (KANANA.matmul_fp8 or 0.0, matmul_fp8),
        "moving": (KANANA.moving, moving),
    }
    yield f"of {len(own)} figures, least squares of log errors:"
    for name, (now, best) in fitted.items():
        yield f"  {name:<12} {best:.3g} (calibration.py has {now:.3g})"


TABLE_START = "| | | measured | predicted | error |"
UNITS = {
    "peak memory": "GiB",
    "activations": "GiB",
    "passes": "s",
    "step": "s",
    "update": "s",
    "memory between steps": "GiB",
    "throughput": "TFLOP/s",
}


def run_values(run: RunPlan) -> dict[str, Any]:
    """A run as plain values; bytes, seconds, operations and tokens."""
    return {
        "tokens": run.tokens,
        "days": run.days,
        "gpu_hours": run.gpu_hours,
        "batches": [{"tokens": tokens, **plan_values(plan)} for tokens, plan in run.plans],
    }


def plan_values(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    layout = dataclasses.asdict(plan.job.layout)
    memory = []
    for rank in plan.memory:
        values = dataclasses.asdict(rank)
        values["parameters"] = {
            f"{group}, {optimizer}": count for (group, optimizer), count in rank.parameters.items()
        }
        memory.append({**values, "peak": rank.peak})
    return {
        "machine": dataclasses.asdict(plan.job.machine),
        "implementation": plan.job.implementation.name,
        "attention": plan.job.implementation.attention.name,
        "experts": plan.job.implementation.experts.name,
        "fp8": sorted(plan.job.fp8),
        "layout": {**layout, "recompute": sorted(plan.job.layout.recompute)},
        "fits": plan.fits,
        "memory": memory,
        "step": plan.step,
        "parts": dict(plan.parts),
        "flops_per_token": plan.flops,
        "flops_per_gpu": plan.flops_per_gpu,
        "utilization": plan.utilization,
        "tokens_per_day": plan.tokens_per_second * 86400,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_seconds": plan.checkpoint_seconds,
    }


def search_values(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Found layouts as plain values."""
    return [{"overrides": each.overrides, **plan_values(each.plan)} for each in candidates]


def comparison_values(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as plain values."""
    return [
        {
            "name": each.observation.name,
            "quantity": each.observation.quantity,
            "unit": UNITS[each.observation.quantity],
            "measured": each.observation.measured,
            "predicted": each.predicted,
            "error": each.error,
            "left_out": each.left_out,
            "calibrated": list(each.observation.calibrated),
            "source": each.observation.source,
        }
        for each in comparisons
    ]
