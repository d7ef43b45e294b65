"""Kills at random instants, until every phase and layout has seen many.

    python -m tests.faults.campaign --kills 200 [--seed 1] [--layouts ep2 pp2]
    python -m tests.faults.campaign --freezes 6 --signals 12 --card fault_signals_cpu

Each layout's undisturbed run is made first. Disturbed runs follow, each with several SIGKILLs, with
one rank frozen by SIGSTOP, or with several SIGUSR1. Each must end as the undisturbed one: all
tensors of its last checkpoint bit by bit, its ledger, metrics.jsonl, the samples that each step has
fed. The watchdog must name a frozen rank. The result is the card `fault_campaign_cpu`.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.card import Row, write_card
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from tests.faults.kills import DisturbedRun, Kill
from tests.faults.undisturbed import Outcome, differences
from tests.indexed_datasets import write_documents
from tests.launch import CONFIG_DIR

STEPS = 16
LENGTH = 32
KILLS_OF_A_RUN = 10
SIGNALS_OF_A_RUN = 4
FROZEN_SECONDS = 5
"""The watchdog's limit where a rank is frozen."""

VOCAB_SIZE = 2048
SOURCES = {"web": range(10, 600), "code": range(600, 1300), "korean": range(1300, 2048)}


@dataclass(frozen=True)
class Layout:
    """Processes and settings of some runs."""

    title: str
    processes: int
    overrides: tuple[str, ...]


LAYOUTS = {
    "tp2_dp2": Layout("TP2 x DP2", 4, ("parallel.tensor_parallel_size=2",)),
    "ep2": Layout("EP2", 2, ("parallel.expert_parallel_size=2", "precision=bf16")),
    "pp2": Layout("PP2", 2, ("parallel.pipeline_parallel_size=2",)),
}


@dataclass
class Result:
    """What a layout's runs gave.

    Attributes:
        problems: by name of the run; empty where all ended as the undisturbed one.
        freezes: ranks that were frozen, one a run.
        noticed: seconds from each freeze to the watchdog's report.
        signals: SIGUSR1 to a rank.
    """

    runs: int = 0
    kills: list[Kill] = field(default_factory=list)
    freezes: list[Kill] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    signals: list[Kill] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)


class Campaign:
    """Data and settings that all runs share.

    Args:
        folder: gets data and runs.
        seed: of everything that is random.
        cache_dir: where the built-in tokenizer is, or is to be.
        steps: of each run.
    """

    def __init__(self, folder: Path, seed: int, cache_dir: Path, steps: int = STEPS) -> None:
        self.folder = folder
        self.seed = seed
        self.steps = steps
        self._undisturbed: dict[str, Outcome] = {}
        prepare_builtin_data(builtin_data(cache_dir, VOCAB_SIZE), VOCAB_SIZE)
        tokenizer = builtin_data(cache_dir, VOCAB_SIZE).tokenizer
        generator = np.random.default_rng(seed)
        data = folder / "data"
        data.mkdir(parents=True)
        for name, tokens in SOURCES.items():
            lengths = generator.integers(20, 200, 60)
            documents = [list(map(int, generator.choice(tokens, n))) for n in lengths]
            write_documents(data / name, documents)
        weights = {"web": 5, "code": 2, "korean": 1}
        blend = ",".join(f"{{path:{data / name},weight:{w}}}" for name, w in weights.items())
        self._overrides = [
            *("--config-dir", str(CONFIG_DIR), "experiment=small"),
            *(f"output_dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"),
            *(f"data.sequence_length={LENGTH}", f"data.blend=[{blend}]"),
            f"data.blend_changes=[{{tokens:{60 * LENGTH},weights:{{web:1,code:0,korean:3}}}}]",
            f"data.tokenizer={tokenizer}",
            *(f"schedule.steps={steps}", "schedule.global_batch_size=4"),
            f"schedule.batch_size_changes=[{{tokens:{40 * LENGTH},global_batch_size:8}}]",
            *("schedule.weight_average_decay=0.9", "schedule.evaluation_interval=8"),
            *("schedule.evaluation_batches=1", "optimizer=muon"),
            *("optimizer.qk_clip_threshold=0.05", "checkpoint.save_interval=2"),
        ]

    def kill(self, name: str, kills: int, result: Result) -> None:
        """Disturb runs of a layout until so many kills were sent."""
        number = 0
        while len(result.kills) < kills and number < 2 * kills:
            wanted = min(KILLS_OF_A_RUN, kills - len(result.kills))
            run = self._disturb(
                name, f"{name}_{number}", wanted, result, asynchronous=number % 4 != 3
            )
            result.kills += run.kills
            number += 1

    def freeze(self, name: str, freezes: int, result: Result) -> None:
        """Freeze a rank in each of so many runs of a layout."""
        for number in range(freezes):
            run = self._disturb(name, f"{name}_frozen_{number}", 1, result, number=signal.SIGSTOP)
            result.freezes += run.kills
            reports = {path: path.read_text() for path in run.run_dir.glob("hangs/*/report.txt")}
            for freeze in run.kills:
                named = [path for path in reports if _names(reports[path], freeze.rank)]
                result.noticed += [path.stat().st_mtime - freeze.at for path in named]
                if len(named) != 1:
                    problem = f"rank {freeze.rank} was frozen, the watchdog said: {reports}"
                    result.problems.setdefault(run.run_dir.name, []).append(problem)
            print(*reports.values(), sep="\n")

    def interrupt(self, name: str, signals: int, result: Result) -> None:
        """Send SIGUSR1 to runs of a layout until so many were sent."""
        number = 0
        while len(result.signals) < signals and number < 2 * signals:
            wanted = min(SIGNALS_OF_A_RUN, signals - len(result.signals))
            run_name = f"{name}_signalled_{number}"
            run = self._disturb(name, run_name, wanted, result, number=signal.SIGUSR1)
            result.signals += run.kills
            number += 1

    def undisturbed(self, layout: str) -> Outcome:
        """The layout's run that nobody disturbs, made at first use."""
        if layout not in self._undisturbed:
            outcome, quiet = self._run(layout, f"{layout}_undisturbed", 0)
            assert outcome is not None, quiet.problems
            self._undisturbed[layout] = outcome
        return self._undisturbed[layout]

    def _disturb(
        self, layout: str, run_name: str, wanted: int, result: Result, **how: Any
    ) -> DisturbedRun:
        """Disturb a run and compare it with the undisturbed one."""
        undisturbed = self.undisturbed(layout)
        begin = time.monotonic()
        outcome, run = self._run(layout, run_name, wanted, **how)
        problems = [*run.problems]
        if outcome is not None:
            problems += differences(outcome, undisturbed)
        if problems:
            result.problems[run_name] = problems
        result.runs += 1
        phases = ", ".join(f"{k.phase} {k.step} ({k.victim})" for k in run.kills)
        print(
            f"{run_name}: {len(run.kills)} signals in {time.monotonic() - begin:.0f} s: {phases}:"
            f" {'DIFFERS ' + str(problems) if problems else 'as undisturbed'}",
            flush=True,
        )
        return run

    def _run(
        self,
        layout: str,
        run_name: str,
        kills: int,
        *,
        asynchronous: bool = True,
        number: signal.Signals = signal.SIGKILL,
    ) -> tuple[Outcome | None, DisturbedRun]:
        run_dir = self.folder / "runs" / run_name
        observed = self.folder / "observed" / run_name
        arguments = [
            *(*self._overrides, *LAYOUTS[layout].overrides, f"run_name={run_name}"),
            f"checkpoint.asynchronous={str(asynchronous).lower()}",
        ]
        if number == signal.SIGSTOP:
            arguments += [f"watchdog.timeout={FROZEN_SECONDS}", "watchdog.long_timeout=60"]
        randomness = random.Random(f"{self.seed} {run_name}")
        processes = LAYOUTS[layout].processes
        run = DisturbedRun(observed, run_dir, arguments, processes, kills, randomness, number)
        run.run()
        return (None if run.problems else Outcome(run_dir, observed, self.steps)), run


def rows(results: dict[str, Result]) -> list[Row]:
    """The card's rows."""
    kills = [kill for result in results.values() for kill in result.kills]
    freezes = [freeze for result in results.values() for freeze in result.freezes]
    noticed = [seconds for result in results.values() for seconds in result.noticed]
    table = [
        Row("SIGKILLs", "kills", len(kills)),
        Row(
            "runs that differ from the undisturbed one",
            f"of {sum(result.runs for result in results.values())} runs",
            sum(len(result.problems) for result in results.values()),
        ),
    ]
    for name, result in results.items():
        phases = Counter(kill.phase for kill in result.kills)
        table += [
            Row(f"{LAYOUTS[name].title}: killed during {_WORDS[phase]}", "kills", count)
            for phase, count in sorted(phases.items())
        ]
    victims = Counter(kill.victim for kill in kills)
    table += [Row(f"victim: {victim}", "kills", count) for victim, count in victims.items()]
    for name, result in results.items():
        title = f"{LAYOUTS[name].title}: from kill to next step"
        table += _times(title, [kill.restart_seconds for kill in result.kills])
    if freezes:
        table.append(Row("ranks frozen with SIGSTOP, and named", "of them", len(noticed)))
        title = f"from freeze to report (watchdog.timeout={FROZEN_SECONDS} s)"
        table += _times(title, noticed)
        table += _times("from freeze to next step", [each.restart_seconds for each in freezes])
    for name, result in results.items():
        if result.signals:
            left = [each.left_seconds for each in result.signals]
            title = f"{LAYOUTS[name].title}: from SIGUSR1 until all had saved and left"
            table += [Row(f"{LAYOUTS[name].title}: SIGUSR1", "signals", len(left))]
            table += _times(title, left)
    return table


def _times(title: str, seconds: Sequence[float | None]) -> list[Row]:
    """Median and longest of those that are known."""
    known = [each for each in seconds if each is not None]
    if not known:
        return []
    return [
        Row(f"{title}, median", "s", statistics.median(known), runs=len(known)),
        Row(f"{title}, longest", "s", max(known), runs=len(known)),
    ]


_WORDS = {
    "starting": "start-up",
    "step": "a step",
    "saving": "the part of a save that training waits for",
    "background": "a save in the background",
    "evaluation": "an evaluation",
    "ending": "the last save",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns 1 where a run differs from the undisturbed one."""
    parser = argparse.ArgumentParser(description="Kill processes at random instants.")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs over all layouts")
    parser.add_argument("--freezes", type=int, default=0, help="runs with a frozen rank")
    parser.add_argument("--signals", type=int, default=0, help="SIGUSR1 over all layouts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--card", default="fault_campaign_cpu", help="name of the card")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        campaign = Campaign(folder, options.seed, folder / "cache")
        results = {name: Result() for name in options.layouts}
        for index, (name, result) in enumerate(results.items()):
            campaign.kill(name, _share(options.kills, index, len(results)), result)
            campaign.freeze(name, _share(options.freezes, index, len(results)), result)
            campaign.interrupt(name, _share(options.signals, index, len(results)), result)
    for name, result in results.items():
        for run, problems in result.problems.items():
            print(f"{name} {run}: {json.dumps(problems, indent=2)}")
    table = rows(results)
    for row in table:
        print(f"{row.name}: {row.ours:g} {row.unit}")
    print(f"card: {write_card(options.card, table)}")
    return int(any(result.problems for result in results.values()))


def _names(report: str, rank: int) -> bool:
    """Whether the watchdog's report names the rank, and it alone, as frozen."""
    silent = [line for line in report.splitlines() if "does not answer" in line]
    return len(silent) == 1 and silent[0].startswith(f"rank {rank} (") and "stopped" in silent[0]


def _share(total: int, index: int, parts: int) -> int:
    return total // parts + (index < total % parts)


if __name__ == "__main__":
    sys.exit(main())
