"""What is said about loss curves that should be alike: rows of a card, and a plot."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .card import Row

LAST_STEPS = 20  # whose losses are averaged
SPIKE = 1.1  # times the largest of the losses just before


def curve_rows(runs: Mapping[str, Sequence[Sequence[float]]], base: str) -> list[Row]:
    """Final losses, distances from the base's curves, and spikes.

    Args:
        runs: by name, the loss of each step of each run; a name's runs differ by rounding alone.
        base: the name that the others are compared with. What its runs are away from each other
            stands as peer beside what the others are away from them.
    """
    alone = [distance(a, b) for a, b in itertools.combinations(runs[base], 2)]
    rows = []
    for name, curves in runs.items():
        finals = [final_loss(curve) for curve in curves]
        mean, count = statistics.fmean(finals), len(curves)
        rows.append(Row(f"{name}: loss of the last {LAST_STEPS} steps", "nats", mean, runs=count))
        if count > 1:
            spread = 100 * statistics.stdev(finals) / mean
            rows.append(Row(f"{name}: standard deviation of it", "%", spread, runs=count))
        spikes_of_run = statistics.fmean(spikes(curve) for curve in curves)
        rows.append(Row(f"{name}: spikes of a run", "steps", spikes_of_run, runs=count))
        if name == base:
            continue
        rows += _change(name, finals, [final_loss(curve) for curve in runs[base]])
        pairs = itertools.product(curves, runs[base])
        away = statistics.fmean(distance(a, b) for a, b in pairs)
        row = Row(f"{name}: mean distance of curves", "nats", away, runs=count)
        if alone:
            row.peer, row.peer_value = "rounding alone", statistics.fmean(alone)
            row.ratio = row.peer_value / away if away else None
        rows.append(row)
    return rows


def _change(name: str, finals: Sequence[float], base: Sequence[float]) -> list[Row]:
    """Mean final loss over the base's, and how far chance may have moved that."""
    at_base = statistics.fmean(base)
    change = 100 * (statistics.fmean(finals) / at_base - 1)
    rows = [Row(f"{name}: change of the final loss", "%", change, runs=len(finals))]
    if min(len(finals), len(base)) > 1:
        error = math.hypot(
            *(statistics.stdev(each) / math.sqrt(len(each)) for each in (finals, base))
        )
        rows.append(
            Row(
                f"{name}: standard error of that change",
                "%",
                100 * error / at_base,
                runs=len(finals),
            )
        )
    return rows


def final_loss(curve: Sequence[float]) -> float:
    """Mean of the last losses."""
    return statistics.fmean(curve[-LAST_STEPS:])


def distance(curve: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference, step by step."""
    return statistics.fmean(abs(a - b) for a, b in zip(curve, other, strict=True))


def spikes(curve: Sequence[float]) -> int:
    """Steps whose loss is more than a tenth above all of the ten before."""
    return sum(curve[step] > SPIKE * max(curve[step - 10 : step]) for step in range(10, len(curve)))


def plot_curves(runs: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """The curves over each other, and below them what they are away from the first's mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(9, 7), height_ratios=(2, 1))
    first, curves_of_first = next(iter(runs.items()))
    mean = [statistics.fmean(losses) for losses in zip(*curves_of_first, strict=True)]
    for index, (name, curves) in enumerate(runs.items()):
        for run, curve in enumerate(curves):
            look = {"color": f"C{index}", "label": name if run == 0 else None}
            above.plot(curve, linewidth=1, **look)
            below.plot([a - b for a, b in zip(curve, mean, strict=True)], linewidth=0.5, **look)
    above.set_ylabel("loss, nats")
    above.legend(frameon=False)
    below.set_ylabel(f"less the mean of\n{first}")
    below.set_xlabel("step")
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
