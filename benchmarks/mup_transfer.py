"""Does the best learning rate of a narrow model serve wider ones: with and without muP.

python -m benchmarks.mup_transfer --name mup_transfer_adamw_h100 --optimizers adamw \\
    --exponents -12 -6 --steps 200 --processes 12
python -m benchmarks.mup_transfer --name mup_transfer_muon_h100 --optimizers muon \\
    --exponents -11 -5 --steps 200 --processes 12

A grid of learning rates, factors of 2 apart, over widths (experts and heads grow alike), both
parametrisations and both optimizers; each run trains a small Kanana-2 on the built-in text and
ends with its loss on held-out text. Runs share one device: their many small kernels leave it idle
most of the time, so several processes train beside one another. At the base width both
parametrisations are the same run, which is made once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_kanana.planning.learning_rate_law import NoOptimumError, fit_parabola

from .card import RESULTS_DIR, Row, write_card
from .several_runs import (
    PARAMETRIZATIONS,
    OneProcess,
    parametrization_overrides,
    settings_of,
    width_overrides,
)

BASE_HIDDEN_SIZE, BASE_NUM_EXPERTS = 128, 4
OPTIMIZERS = ("adamw", "muon")
INIT_STD = 0.06  # 0.68 / sqrt(base width), as 0.02 is for a width of about 1,000
NEAREST = 3  # learning rates of a parabola


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        multiple: width over the base width.
        learning_rate: peak, of the base width.
    """

    optimizer: str
    parametrization: str
    multiple: int
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        loss: held-out loss at the end, in nats a token; None if it diverged.
        seconds: of training.
    """

    job: Job
    loss: float | None
    seconds: float


Losses = dict[float, float]
"""Finite losses by learning rate."""


def main() -> None:
    """Run the grid, plot, and write the card and every loss."""
    options = parse_arguments()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*run_overrides(options), f"data.cache_dir={folder}"]
        results = run_grid(grid(options), overrides, options.processes, options.minutes, start)
    options.results_dir.mkdir(parents=True, exist_ok=True)
    path = options.results_dir / f"{options.name}_losses.json"
    rows = [
        {**asdict(result.job), "loss": result.loss, "seconds": result.seconds} for result in results
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    plot(results, options.results_dir / f"{options.name}.png")
    card = card_rows(results, options.multiples, time.monotonic() - start)
    print(write_card(options.name, card, options.results_dir).read_text())


def parse_arguments() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card, the plot and the losses")
    parser.add_argument("--processes", type=int, default=1, help="runs beside one another")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--exponents",
        type=int,
        nargs=2,
        default=[-13, -5],
        help="smallest and largest learning rate, as powers of 2",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a step")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after that")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    return parser.parse_args()


def grid(options: argparse.Namespace) -> list[Job]:
    """All runs; the longest of each optimizer first, so that the last ones are short."""
    low, high = options.exponents
    jobs = [
        Job(optimizer, parametrization, multiple, 2.0**exponent)
        for optimizer, multiple, parametrization, exponent in itertools.product(
            options.optimizers,
            sorted(options.multiples, reverse=True),
            PARAMETRIZATIONS,
            range(high, low - 1, -1),
        )
    ]
    return [job for job in jobs if job.multiple > 1 or job.parametrization == PARAMETRIZATIONS[0]]


def run_overrides(options: argparse.Namespace) -> list[str]:
    """What all runs have in common."""
    warmup, decay = options.steps // 10, options.steps // 5
    return [
        f"model.init_std={INIT_STD}",
        "model.num_layers=3",
        "model.num_experts_per_token=2",
        "model.ffn_hidden_size=512",
        "model.moe_ffn_hidden_size=64",
        f"data.sequence_length={options.sequence_length}",
        f"schedule.global_batch_size={options.sequences}",
        f"schedule.micro_batch_size={options.sequences}",
        f"schedule.steps={options.steps}",
        f"schedule.warmup_steps={warmup}",
        f"schedule.decay_steps={decay}",
        "schedule.minimum_learning_rate=0",
        f"schedule.evaluation_interval={options.steps}",
        "schedule.evaluation_batches=8",
    ]


def run_grid(
    jobs: Sequence[Job], overrides: Sequence[str], processes: int, minutes: float, start: float
) -> list[Result]:
    """Run the jobs in several processes of one device; those not started in time are left out."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    context = multiprocessing.get_context("spawn")
    deadline = start + 60 * minutes
    with context.Pool(processes, _start_process) as pool:
        pool.apply(_prepare_data, (overrides,))
        finished = pool.imap_unordered(
            partial(_run, overrides=overrides, deadline=deadline), jobs, chunksize=1
        )
        results = []
        for number, result in enumerate(finished, 1):
            if result is not None:
                results.append(result)
                loss = "diverged" if result.loss is None else f"{result.loss:.4f}"
                job = result.job
                print(
                    f"{number}/{len(jobs)} {job.optimizer} {job.parametrization} x{job.multiple}"
                    f" {job.learning_rate:.2e}: {loss} ({result.seconds:.1f} s,"
                    f" {time.monotonic() - start:.0f} s in all)",
                    flush=True,
                )
    return results


def losses_by_width(
    results: Iterable[Result], optimizer: str, parametrization: str
) -> dict[int, Losses]:
    """Finite losses by width and learning rate."""
    found: dict[int, Losses] = {}
    for result in results:
        job = result.job
        same = job.multiple == 1 or job.parametrization == parametrization
        if job.optimizer == optimizer and same and result.loss is not None:
            found.setdefault(job.multiple, {})[job.learning_rate] = result.loss
    return {multiple: found[multiple] for multiple in sorted(found)}


def optimum(losses: Losses) -> float:
    """Lowest point of a parabola through the best rates; the best one where there is none."""
    try:
        return fit_parabola(losses, NEAREST).optimum
    except NoOptimumError:
        return best_of(losses)


def best_of(losses: Losses) -> float:
    """The learning rate with the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def card_rows(results: Sequence[Result], multiples: Sequence[int], seconds: float) -> list[Row]:
    """Best learning rates of every width, how far apart they are, and losses at the base's best."""
    rows = [Row("runs", "1", len(results)), Row("whole grid", "s", seconds)]
    for optimizer in dict.fromkeys(result.job.optimizer for result in results):
        mup, standard = (losses_by_width(results, optimizer, name) for name in PARAMETRIZATIONS)
        if set(mup) != set(multiples) or set(standard) != set(multiples):
            continue  # ran out of time
        best = {
            name: {multiple: best_of(losses) for multiple, losses in found.items()}
            for name, found in zip(PARAMETRIZATIONS, (mup, standard), strict=True)
        }
        peer = "standard parametrisation"
        for multiple in multiples:
            rows.append(
                Row(
                    f"{optimizer}, best learning rate of the grid at {multiple}x",
                    "1",
                    best["muP"][multiple],
                    peer,
                    best["standard"][multiple],
                )
            )
            rows.append(
                Row(
                    f"{optimizer}, optimum of the parabola at {multiple}x",
                    "1",
                    optimum(mup[multiple]),
                    peer,
                    optimum(standard[multiple]),
                )
            )
            base_rate = best["muP"][min(multiples)]
            ours, theirs = (found[multiple].get(base_rate, math.nan) for found in (mup, standard))
            rows.append(
                Row(
                    f"{optimizer}, loss at {multiple}x with the best learning rate of 1x",
                    "nats a token",
                    ours,
                    peer,
                    theirs,
                    theirs / ours,
                )
            )
        optima = {
            name: {multiple: optimum(losses) for multiple, losses in found.items()}
            for name, found in zip(PARAMETRIZATIONS, (mup, standard), strict=True)
        }
        for what, rates in (("best learning rates", best), ("optima of the parabolas", optima)):
            ours, theirs = (
                math.log2(max(of_widths.values()) / min(of_widths.values()))
                for of_widths in rates.values()
            )
            rows.append(Row(f"{optimizer}, {what} apart", "factors of 2", ours, peer, theirs))
    return rows


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss against learning rate: a row for each optimizer, a column for each parametrisation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    optimizers = list(dict.fromkeys(result.job.optimizer for result in results))
    figure, panels = plt.subplots(
        len(optimizers),
        2,
        figsize=(12, 4.5 * len(optimizers)),
        sharex="row",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, optimizer in zip(panels, optimizers, strict=True):
        for axes, parametrization in zip(row, PARAMETRIZATIONS, strict=True):
            found = losses_by_width(results, optimizer, parametrization)
            for index, (multiple, losses) in enumerate(found.items()):
                rates = sorted(losses)
                color = f"C{index}"
                axes.plot(
                    rates, [losses[rate] for rate in rates], "o-", color=color, label=f"{multiple}x"
                )
                axes.axvline(optimum(losses), color=color, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_title(f"{optimizer}, {parametrization}")
            axes.set_xlabel("learning rate")
            axes.grid(alpha=0.3)
        lowest = min(result.loss for result in results if result.loss is not None)
        row[0].set_ylim(lowest - 0.1, lowest + 2.0)
        row[0].set_ylabel("held-out loss (nats a token)")
        row[0].legend(title="width")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _settings(job: Job, overrides: Sequence[str]) -> Any:
    return settings_of(
        [
            *width_overrides(BASE_HIDDEN_SIZE, BASE_NUM_EXPERTS, job.multiple),
            *parametrization_overrides(job.parametrization, BASE_HIDDEN_SIZE),
            f"optimizer={job.optimizer}",
            f"optimizer.learning_rate={job.learning_rate}",
            *overrides,
        ]
    )


_processes: list[OneProcess] = []
"""This worker's, once it has started."""


def _start_process() -> None:
    settings = settings_of(["logging.report=false"])
    _processes.append(OneProcess(settings))


def _prepare_data(overrides: Sequence[str]) -> None:
    """Make tokenizer, datasets and their index before several processes look for them."""
    from megatron_kanana.training.run import training_data

    run = _processes[0].build(_settings(Job("adamw", "muP", 1, 1e-3), overrides))
    training_data(run)


def _run(job: Job, overrides: Sequence[str], deadline: float) -> Result | None:
    """One run; None after the deadline."""
    from megatron_kanana.training.evaluation import evaluate
    from megatron_kanana.training.run import training_data
    from megatron_kanana.training.step import train_step

    if time.monotonic() > deadline:
        return None
    run = _processes[0].build(_settings(job, overrides))
    iterators, held_out = training_data(run)
    start = time.monotonic()
    while run.step < run.settings.schedule.steps:
        if not train_step(run, iterators).applied:
            return Result(job, None, time.monotonic() - start)
    loss = evaluate(run, held_out)
    finite = loss if math.isfinite(loss) else None
    return Result(job, finite, time.monotonic() - start)


if __name__ == "__main__":
    main()
