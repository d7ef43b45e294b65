"""What is said about loss curves that should be alike: rows of a card, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .card import Row

LAST_STEPS = 20  # whose losses are averaged
SPIKE = 1.1  # times the largest of the losses just before


def curve_rows(curves: Mapping[str, Sequence[float]], base: str, noise: str) -> list[Row]:
    """Final losses, distances from the base's curve, and spikes.

    Args:
        curves: loss of each step, by name.
        base: the one that the others are compared with.
        noise: part of the names of curves that differ from the base's by rounding alone. What
            they are away from it stands as peer beside what the others are away.
    """
    of_noise = [distance(curves[base], curve) for name, curve in curves.items() if noise in name]
    rows = []
    for name, curve in curves.items():
        final = final_loss(curve)
        rows.append(Row(f"{name}: loss of the last {LAST_STEPS} steps", "nats", final))
        rows.append(Row(f"{name}: spikes", "steps", float(spikes(curve))))
        if name == base:
            continue
        change = 100 * (final / final_loss(curves[base]) - 1)
        rows.append(Row(f"{name}: change of the final loss", "%", change))
        away = distance(curves[base], curve)
        peer = None if noise in name or not of_noise else "rounding alone"
        value = max(of_noise) if peer else None
        ratio = value / away if value is not None and away else None
        rows.append(Row(f"{name}: mean distance of curves", "nats", away, peer, value, ratio))
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


def plot_curves(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """The curves over each other, and below them what they are away from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(9, 7), height_ratios=(2, 1))
    base = next(iter(curves.values()))
    for name, curve in curves.items():
        above.plot(curve, label=name, linewidth=1)
        below.plot([a - b for a, b in zip(curve, base, strict=True)], label=name, linewidth=0.7)
    above.set_ylabel("loss, nats")
    above.legend(frameon=False)
    below.set_ylabel(f"less that of\n{next(iter(curves))}")
    below.set_xlabel("step")
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
