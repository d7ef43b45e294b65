"""Find the learning rate of a token budget from the runs of a sweep.

    python -m tools.fit_learning_rate sweep.csv --tokens 10e12 --plot law.png
    python -m tools.fit_learning_rate runs/lr_* --from-tokens 255e9 --every 10e9 --tokens 10e12

Each run has one learning rate; tables have the columns learning_rate, tokens and loss. At each
token count a parabola in the logarithm of the learning rate gives the best one; a line through the
logarithms of the best ones gives that of any token count (arXiv 2608.20061). Losses of averaged
weights have less noise: schedule.weight_average_decay.

Exit code 1 if there is no law, or one that explains too little; 2 for what cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kanana.planning.learning_rate_law import (
    Law,
    Measurement,
    NoLawError,
    Optima,
    find_optima,
    fit_law,
)
from megatron_kanana.planning.sweep_table import TableError, choose_tokens, read_measurements


def main(arguments: list[str] | None = None) -> int:
    """Fit and report; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        everything = read_measurements(options.runs)
    except (TableError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    first, last, every = options.from_tokens, options.to_tokens, options.every
    measurements = choose_tokens(everything, first, last, every)
    optima = find_optima(measurements, options.nearest)
    for tokens, parabola in optima.parabolas.items():
        points = f"{parabola.num_points} learning rates"
        print(f"{tokens:.4g} tokens: {parabola.optimum:.4g}, loss {parabola.lowest:.4f} ({points})")
    for tokens, reason in optima.without.items():
        print(f"{tokens:.4g} tokens: {reason}")
    try:
        law = fit_law({tokens: found.optimum for tokens, found in optima.parabolas.items()})
    except NoLawError as error:
        print(f"no law: {error}", file=sys.stderr)
        law = None
    doubts = [] if law is None else reasons_to_doubt(law, optima, options)
    if law is not None:
        print("\n".join(describe(law, options)))
    for doubt in doubts:
        print(f"do not trust this law: {doubt}", file=sys.stderr)
    if options.json is not None:
        report = as_dict(law, optima, doubts, options)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(options.plot, measurements, optima, law, options)
    return 1 if law is None or doubts else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fit_learning_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="tables, or folders of runs")
    parser.add_argument("--tokens", type=float, help="budget to find the learning rate for")
    parser.add_argument("--from-tokens", type=float, default=0.0, help="smallest count to fit to")
    parser.add_argument("--to-tokens", type=float, default=math.inf, help="largest count to fit to")
    parser.add_argument("--every", type=float, help="one count for each multiple of this")
    parser.add_argument(
        "--nearest", type=int, help="learning rates of a parabola, those nearest the best"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the band (0.95)")
    parser.add_argument(
        "--min-r-squared", type=float, default=0.8, help="below it the law is not trusted (0.8)"
    )
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args(arguments)
    if options.every is not None and options.every <= 0:
        parser.error("--every must be above 0")
    if options.tokens is not None and options.tokens <= 0:
        parser.error("--tokens must be above 0")
    if not 0 < options.confidence < 1:
        parser.error("--confidence must lie between 0 and 1")
    return options


def reasons_to_doubt(law: Law, optima: Optima, options: argparse.Namespace) -> list[str]:
    """What speaks against using the law."""
    doubts = []
    if not law.r_squared >= options.min_r_squared:
        low, high = law.exponent_interval(options.confidence)
        doubts.append(
            f"R^2 = {law.r_squared:.3f} is below {options.min_r_squared}: the optima scatter, or do"
            f" not depend on tokens (the exponent lies between {low:.3f} and {high:.3f})"
        )
    if len(optima.without) > len(optima.parabolas):
        doubts.append(
            f"{len(optima.without)} of {len(optima.without) + len(optima.parabolas)} token counts"
            " have no optimum"
        )
    return doubts


def describe(law: Law, options: argparse.Namespace) -> list[str]:
    """The law in words."""
    percent = f"{100 * options.confidence:g} %"
    low, high = law.exponent_interval(options.confidence)
    lines = [
        f"log(learning rate) = {law.exponent:.4f} log(tokens) {law.intercept:+.4f}",
        f"R^2 = {law.r_squared:.4f} over {law.num_points} token counts;"
        f" exponent {low:.4f} to {high:.4f} ({percent})",
    ]
    if options.tokens is not None:
        low, high = law.band(options.tokens, options.confidence)
        rate = law.learning_rate(options.tokens)
        lines.append(
            f"learning rate for {options.tokens:.4g} tokens: {rate:.4g}"
            f" ({low:.4g} to {high:.4g}, {percent})"
        )
    return lines


def as_dict(
    law: Law | None, optima: Optima, doubts: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """All numbers, for JSON."""
    report: dict[str, Any] = {
        "law": None if law is None else dataclasses.asdict(law),
        "doubts": list(doubts),
        "optima": [
            {"tokens": tokens, **dataclasses.asdict(parabola)}
            for tokens, parabola in optima.parabolas.items()
        ],
        "without_optimum": [
            {"tokens": tokens, "reason": reason} for tokens, reason in optima.without.items()
        ],
    }
    if law is not None and options.tokens is not None:
        low, high = law.band(options.tokens, options.confidence)
        report["budget"] = {
            "tokens": options.tokens,
            "learning_rate": law.learning_rate(options.tokens),
            "low": low,
            "high": high,
            "confidence": options.confidence,
        }
    return report


def plot(
    path: Path,
    measurements: Sequence[Measurement],
    optima: Optima,
    law: Law | None,
    options: argparse.Namespace,
) -> None:
    """Losses with their parabolas, and optima with the law and its band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(optima.parabolas)))
    for shade, (tokens, parabola) in zip(shades, optima.parabolas.items(), strict=True):
        points = sorted((m.learning_rate, m.loss) for m in measurements if m.tokens == tokens)
        rates = np.geomspace(points[0][0], points[-1][0], 100)
        left.plot(*zip(*points, strict=True), "o", color=shade)
        left.plot(rates, [parabola.loss(rate) for rate in rates], color=shade)
        left.plot(parabola.optimum, parabola.lowest, "x", color=shade, label=f"{tokens:.3g}")
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    left.set_ylabel("loss (nats a token)")
    if 0 < len(optima.parabolas) <= 12:
        left.legend(title="tokens")
    counts = list(optima.parabolas)
    right.loglog(counts, [found.optimum for found in optima.parabolas.values()], "o")
    if law is not None:
        budgets = [options.tokens] if options.tokens is not None else []
        grid = [float(x) for x in np.geomspace(min(counts), max([*counts, *budgets]), 100)]
        right.loglog(grid, [law.learning_rate(count) for count in grid], color="C1")
        low, high = zip(*(law.band(count, options.confidence) for count in grid), strict=True)
        right.fill_between(grid, low, high, color="C1", alpha=0.2)
        for budget in budgets:
            right.plot(budget, law.learning_rate(budget), "*", color="C3", markersize=12)
        right.set_title(f"exponent {law.exponent:.3f}, R^2 = {law.r_squared:.3f}")
    right.set_xlabel("tokens")
    right.set_ylabel("best learning rate")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
