"""Trains a model of 1.2 billion parameters on real text with MuonClip, kills a rank, and goes on.

python -m benchmarks.multi_gpu.train --processes 4 --name train_4_h100 --seconds 580

The text is the sources of the installed Python packages, or --text. A short start measures a step;
then as many steps are trained as the time takes, under the project's launcher. In the middle a
random rank is killed; the launcher starts all again, from the newest checkpoint. Leaves card, loss
curve and the run's report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import RESULTS_DIR, Row, write_card
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from megatron_kanana.training.records import read_records

from . import starts
from .corpus import write_package_sources
from .killing import Told, run_with_a_kill, steps_of, watch
from .starts import ROOT, Place

MODEL = (
    "model=kanana_2_30b_a3b",
    "model.name=kanana_2_1b",
    "model.num_layers=12",
    "model.hidden_size=1024",
    "model.num_attention_heads=8",
    "model.ffn_hidden_size=3072",
    "model.num_experts=64",
    "model.moe_ffn_hidden_size=512",
    "optimizer.learning_rate=1.0e-3",
    "schedule.minimum_learning_rate=1.0e-4",
    "data.sequence_length=2048",
    "schedule.micro_batch_size=4",
)
"""1.2 billion parameters, 0.2 of them active; widths of heads as the 30B's."""
VOCABULARY, TINY_VOCABULARY = 8192, 4096
SEQUENCES = 16  # of a step, for each process
TINY_STEPS = 12
PROBE_STEPS = 8
SAVES = 4
KILL = 3 / 8
"""Part of the steps after which a rank is killed: half of the way from a checkpoint to the next."""
DONE_TWICE = KILL - 1 / SAVES
RESERVE_SECONDS = 150.0
"""For starting, for torchrun's 30 s until it kills who waits for a killed rank, for starting again,
loading, saving, evaluating and the report."""


class Training:
    """One training and what it takes.

    Args:
        options: of the command line.
        work: folder for everything.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.end = time.monotonic() + options.seconds
        on_cuda = options.device == "cuda"
        self.place = Place(on_cuda, tuple(range(options.processes)) if on_cuda else ())
        self.cache_dir = options.cache_dir or work / "data"
        self.log = work / "train.log"
        self.words: list[str] = []

    def prepare(self) -> None:
        """Tokenizer, text and settings."""
        options = self.options
        vocabulary = TINY_VOCABULARY if options.tiny else VOCABULARY
        builtin = builtin_data(self.cache_dir, vocabulary)
        prepare_builtin_data(builtin, vocabulary)
        self.words = ["optimizer=muon", f"precision={options.precision}"]
        self.words += [f"data.cache_dir={self.cache_dir}", f"output_dir={self.work}"]
        self.words.append(f"parallel.expert_parallel_size={options.processes}")
        if options.tiny:
            self.words += ["schedule.global_batch_size=4", "schedule.micro_batch_size=1"]
            self.words += ["data.num_workers=0", "logging.sample_tokens=4"]
            return
        self.words += [*MODEL, f"model.vocab_size={vocabulary}"]
        self.words.append(f"schedule.global_batch_size={SEQUENCES * options.processes}")
        text = options.text
        if not text:
            text = [self.work / "sources.jsonl"]
            write_package_sources(text[0], int(options.text_mb * 1e6))
        corpus = self.work / "corpus"
        subprocess.run(
            [
                *(sys.executable, "tools/preprocess_data.py", *map(str, text)),
                *("--tokenizer", str(builtin.tokenizer), "--output", str(corpus)),
                "--shard-mb=8",  # so that all cores have some
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": starts.environment(self.place)["PYTHONPATH"]},
            check=True,
        )
        self.words += [f"data.tokenizer={builtin.tokenizer}", f"data.blend=[{{path:{corpus}}}]"]

    def command(self, name: str, steps: int, *words: str, restarts: int = 0) -> list[str]:
        """The launcher's command line for a run."""
        schedule = [
            f"schedule.steps={steps}",
            f"schedule.warmup_steps={max(1, steps // 20)}",
            f"schedule.decay_steps={steps // 4}",
            f"schedule.evaluation_interval={max(1, steps // 4)}",
        ]
        words = (*self.words, *schedule, f"run_name={name}", *words, *self.options.overrides)
        module = "megatron_kanana.train"
        return starts.command(module, words, self.options.processes, self.place, restarts)

    def steps_in_time(self) -> int:
        """Steps that the time takes, by a start that is ended once it has done a few.

        Raises:
            RuntimeError: it did not do them.
        """
        if self.options.tiny:
            return TINY_STEPS
        probe = self.work / "probe"

        def done() -> bool:
            return len(steps_of(probe)) >= PROBE_STEPS

        left = self.end - time.monotonic()
        command = self.command("probe", 10_000)
        if failure := watch(command, self.place, self.log, left / 2, done):
            raise RuntimeError(f"the start that measures a step: {failure}")
        steps = steps_of(probe)
        tokens = steps[0]["tokens"] / steps[0]["step"]
        rates = [record["tokens_per_second"] for record in steps[PROBE_STEPS // 2 :]]
        left = self.end - time.monotonic() - RESERVE_SECONDS
        possible = int(left * statistics.median(rates) / tokens / (1 + DONE_TWICE))
        return max(20, possible // SAVES * SAVES)

    def run(self, steps: int) -> Told:
        """Train, and kill a rank in the middle."""
        save = (f"checkpoint.save_interval={max(1, steps // SAVES)}", "checkpoint.keep_last=1")
        return run_with_a_kill(
            self.command("run", steps, *save, restarts=1),
            self.place,
            self.log,
            self.work / "run",
            processes=self.options.processes,
            kill_step=int(KILL * steps),
            seconds=self.end - time.monotonic(),
        )


def rows_of(told: Told, records: list[dict[str, Any]]) -> list[Row]:
    """Rows of the card."""
    steps = [record for record in records if "loss" in record]
    evaluated = [record["evaluation_loss"] for record in records if "evaluation_loss" in record]
    rates = [record["tokens_per_second"] for record in steps]
    rows = [
        Row("steps", "steps", float(steps[-1]["step"])),
        Row("loss at step 1", "nats a token", steps[0]["loss"]),
        Row(f"loss at step {steps[-1]['step']}", "nats a token", steps[-1]["loss"]),
        Row("throughput, median of steps", "tokens/s", statistics.median(rates)),
    ]
    rows += [Row("held-out loss at the end", "nats a token", evaluated[-1])] if evaluated else []
    if told.rank is not None:
        again = {record["step"]: record["loss"] for record in steps}
        known = {record["step"]: record["loss"] for record in told.before}
        apart = max(abs(again[step] / loss - 1) for step, loss in known.items() if step in again)
        rows.append(Row("step at which a rank was killed", "steps", float(told.step)))
        name = "losses of steps done before the kill, and those of the run that went on"
        rows.append(Row(name, "relative difference, largest", apart))
    if told.seconds_lost is not None:
        rows.append(Row("from the kill to the next step done", "s", told.seconds_lost))
    return rows


def plot(told: Told, records: list[dict[str, Any]], path: Path) -> None:
    """The loss, and where the rank was killed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record for record in records if "loss" in record]
    figure, axes = plt.subplots(figsize=(7, 4))
    for values, label in ((told.before, "before the kill"), (steps, "the run that went on")):
        axes.plot([each["step"] for each in values], [each["loss"] for each in values], label=label)
    if told.rank is not None:
        axes.axvline(told.step, linestyle=":", color="grey", label=f"rank {told.rank} killed")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> int:
    """Train, print and write the card; exit code 1 if the run did not end by itself."""
    options = parse_arguments(arguments)
    results: Path = options.results_dir
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        training = Training(options, work)
        try:
            training.prepare()
            steps = training.steps_in_time()
            print(f"{steps} steps", flush=True)
            told = training.run(steps)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            told = Told(failure=str(error))
        if training.log.exists():
            shutil.copyfile(training.log, results / f"{options.name}.log")
        records = read_records(work / "run" / "metrics.jsonl")
        if not any("loss" in record for record in records):
            print(f"not run: {told.failure}")
            return 1
        rows = rows_of(told, records)
        plot(told, records, results / f"{options.name}.png")
        if (report := work / "run" / "report.html").exists():
            shutil.copyfile(report, results / f"{options.name}.html")
    killed = "nobody was killed" if told.rank is None else f"rank {told.rank} was killed"
    notes = [f"{options.processes} processes, precision={options.precision}, MuonClip; {killed}."]
    notes += [f"not whole: {told.failure}"] if told.failure else []
    for row in rows:
        print(f"{row.name}: {row.ours:.5g} {row.unit}")
    print("\n".join(notes))
    print(write_card(options.name, rows, results, notes))
    return int(bool(told.failure) or told.rank is None)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of card, curve, report and log")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--precision", default="auto", help="of the groups: bf16, fp8_blockwise, …")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help=".jsonl, .txt, .parquet")
    parser.add_argument("--text-mb", type=float, default=200.0, help="of packages' sources")
    parser.add_argument("--seconds", type=float, default=580.0, help="for everything")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, on a fast disk")
    parser.add_argument("--cache-dir", type=Path, help="where the tokenizer may be already")
    parser.add_argument("--tiny", action="store_true", help="the default model, to try the script")
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings of the run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
