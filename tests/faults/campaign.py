"""Kills at random instants, until every phase and layout has seen many.

    python -m tests.faults.campaign --kills 200 [--seed 1] [--layouts ep2 pp2]

Each layout's undisturbed run is made first. Disturbed runs follow, each with several SIGKILLs, and
each must end as the undisturbed one: all tensors of its last checkpoint bit by bit, its ledger,
metrics.jsonl, the samples that each step has fed. The result is the card `fault_campaign_cpu`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.card import Row, write_card
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from tests.faults.kills import DisturbedRun, Kill
from tests.faults.undisturbed import Outcome, differences
from tests.indexed_datasets import write_documents
from tests.launch import CONFIG_DIR

STEPS = 24
LENGTH = 32
KILLS_OF_A_RUN = 8
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
    """

    runs: int = 0
    kills: list[Kill] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)


class Campaign:
    """Data and settings that all runs share.

    Args:
        folder: gets data and runs.
        seed: of everything that is random.
        cache_dir: where the built-in tokenizer is, or is to be.
    """

    def __init__(self, folder: Path, seed: int, cache_dir: Path) -> None:
        self.folder = folder
        self.seed = seed
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
            *(f"schedule.steps={STEPS}", "schedule.global_batch_size=4"),
            f"schedule.batch_size_changes=[{{tokens:{40 * LENGTH},global_batch_size:8}}]",
            *("schedule.weight_average_decay=0.9", "schedule.evaluation_interval=8"),
            *("schedule.evaluation_batches=1", "optimizer=muon"),
            *("optimizer.qk_clip_threshold=0.05", "checkpoint.save_interval=2"),
        ]

    def run(self, name: str, kills: int) -> Result:
        """Disturb runs of a layout until so many kills were sent."""
        layout, result = LAYOUTS[name], Result()
        undisturbed, quiet = self._run(name, f"{name}_undisturbed", 0, asynchronous=True)
        assert not quiet.problems, quiet.problems
        number = 0
        while len(result.kills) < kills and number < 2 * kills:
            run_name = f"{name}_{number}"
            wanted = min(KILLS_OF_A_RUN, kills - len(result.kills))
            begin = time.monotonic()
            outcome, run = self._run(name, run_name, wanted, asynchronous=number % 4 != 3)
            problems = [*run.problems]
            if outcome is not None and undisturbed is not None:
                problems += differences(outcome, undisturbed)
            if problems:
                result.problems[run_name] = problems
            result.runs += 1
            result.kills += run.kills
            phases = ", ".join(f"{k.phase} {k.step} ({k.victim})" for k in run.kills)
            print(
                f"{layout.title}, run {number}: {len(run.kills)} kills in"
                f" {time.monotonic() - begin:.0f} s: {phases}:"
                f" {'DIFFERS ' + str(problems) if problems else 'as undisturbed'}",
                flush=True,
            )
            number += 1
        return result

    def _run(
        self, layout: str, run_name: str, kills: int, *, asynchronous: bool
    ) -> tuple[Outcome | None, DisturbedRun]:
        run_dir = self.folder / "runs" / run_name
        observed = self.folder / "observed" / run_name
        arguments = [
            *(*self._overrides, *LAYOUTS[layout].overrides, f"run_name={run_name}"),
            f"checkpoint.asynchronous={str(asynchronous).lower()}",
        ]
        randomness = random.Random(f"{self.seed} {run_name}")
        processes = LAYOUTS[layout].processes
        run = DisturbedRun(observed, run_dir, arguments, processes, kills, randomness)
        run.run()
        return (None if run.problems else Outcome(run_dir, observed, STEPS)), run


def rows(results: dict[str, Result]) -> list[Row]:
    """The card's rows."""
    kills = [kill for result in results.values() for kill in result.kills]
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
        times = [k.restart_seconds for k in result.kills if k.restart_seconds is not None]
        if times:
            title = f"{LAYOUTS[name].title}: from kill to next step"
            table.append(Row(f"{title}, median", "s", statistics.median(times), runs=len(times)))
            table.append(Row(f"{title}, longest", "s", max(times), runs=len(times)))
    return table


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
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--card", default="fault_campaign_cpu", help="name of the card")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        campaign = Campaign(folder, options.seed, folder / "cache")
        share, more = divmod(options.kills, len(options.layouts))
        results = {
            name: campaign.run(name, share + (index < more))
            for index, name in enumerate(options.layouts)
        }
    for name, result in results.items():
        for run, problems in result.problems.items():
            print(f"{name} {run}: {json.dumps(problems, indent=2)}")
    table = rows(results)
    for row in table:
        print(f"{row.name}: {row.ours:g} {row.unit}")
    print(f"card: {write_card(options.card, table)}")
    return int(any(result.problems for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
