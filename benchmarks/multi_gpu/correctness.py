"""Every layout beside one process, over NCCL on GPUs or over gloo on a CPU.

python -m benchmarks.multi_gpu.correctness --processes 4 --name layouts_4_h100

From one checkpoint each layout trains some steps with AdamW and with MuonClip, in fp32 (TF32 off)
and in bf16; losses, largest attention logits, heads QK-Clip scales down, weights and logits are
compared with those of one process. Where the tests have no tolerance, it is taken from runs on one
process that sum in other orders (docs/multi_gpu.md). A model of transformers' is compared with what
it becomes with its experts over all processes. Exit code 1 if anything differs or was not run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch

from benchmarks.card import RESULTS_DIR, Row, write_card
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from tests.launch import CONFIG_DIR

from . import BEGAN, starts
from .chains import Chain, Failures, Task, run_chains
from .comparison import (
    NOISE_FACTOR,
    Differences,
    Verdict,
    largest_difference,
    noise_of,
    verdicts,
)
from .due import Comparisons, Due, Result
from .jobs import LogitsJob
from .starts import ROOT, Place
from .suites import CUDA_BF16_MODEL, Lengths, Run, Suite

OPTIMIZERS, DTYPES = ("AdamW", "MuonClip"), ("fp32", "bf16")
VOCABULARY = 2048  # of the small model
START = "start"
LOOK_SECONDS = 2.0
"""After which it looks again for runs that have ended."""
ENDING_SECONDS, WRITING_SECONDS = 15.0, 4.0
"""Kept from the time: to end runs and compare the last ones, and of these to write the card."""
VARIABLES = {
    # Each of the many small groups of processes is made anew, which takes longer the more it has.
    "NCCL_MAX_NCHANNELS": "2",
    # Each start would try all variants of Triton's kernels by itself.
    "TRITON_CACHE_AUTOTUNING": "1",
}
"""Of all runs, where nothing else is set."""
NOTES = ["TF32 is off.", "NCCL has at most 2 channels, unless NCCL_MAX_NCHANNELS was set."]
UNITS = {
    "logits": "absolute difference",
    "heads clipped": "difference in heads",
    "expert biases": "layers that differ",
}


class Comparison:
    """All runs of all suites, and what came of them.

    Args:
        options: of the command line.
        work: folder of everything the runs write.
        began: of `time.monotonic`, when the time began.
    """

    def __init__(self, options: argparse.Namespace, work: Path, began: float) -> None:
        self.options, self.work = options, work
        self.place = Place(on_cuda=options.device == "cuda")
        ending, writing = (
            min(each, options.seconds / 3) for each in (ENDING_SECONDS, WRITING_SECONDS)
        )
        self.end_of_runs = began + options.seconds - ending
        self.end_of_comparisons = began + options.seconds - writing
        self.cache_dir = options.cache_dir or work / "data"
        self.failures: Failures = {}
        self.noise: dict[Suite, Differences] = {}
        lengths = Lengths(1, 2, 3) if options.tiny else Lengths()
        powers = [2**power for power in range(options.processes.bit_length())]
        self.counts = options.counts or [each for each in powers if each <= options.processes]
        self.suites = [
            Suite(
                optimizer,
                dtype,
                work / f"{dtype}_{optimizer}",
                self.place.on_cuda,
                options.processes,
                tuple(self.counts),
                tuple(options.layouts),
                lengths,
            )
            for dtype in options.dtypes
            for optimizer in options.optimizers
        ]
        self.comparisons = Comparisons(self.due())

    def run(self) -> None:
        """Run what has time, and compare and write what has ended, while the others run."""
        prepare_builtin_data(builtin_data(self.cache_dir, VOCABULARY), VOCABULARY)
        torch.save(
            torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0)),
            self.work / "tokens.pt",
        )
        converting = None if self.options.without_transformers else self._convert()
        chains = self.chains()
        # GPUs have time for several small runs, which are slow at launching; few cores have not.
        at_once = self.options.at_once or (len(chains) if self.place.on_cuda else 1)
        self.write()  # names all, should nothing come to its end
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run_chains, chains, at_once, self.end_of_runs)
            while wait([running], LOOK_SECONDS).not_done:
                self.compare()
            self.failures = running.result()
        if converting is not None and converting.poll() is None:
            converting.kill()
        self.compare()

    def compare(self) -> None:
        """Compare, print and write what is new."""
        if new := self.comparisons.look(self.end_of_comparisons):
            print("\n".join(map(str, new)), flush=True)
            self.write()

    def chains(self) -> list[Chain]:
        """Of each suite those on one process, which the others wait for, and one for each size."""
        options = self.options
        chains = []
        for index, suite in enumerate(self.suites):
            for processes in (1, *sorted(set(self.counts) - {1}, reverse=True)):
                places = self.place.split(options.processes, processes)
                runs = suite.single_runs() if processes == 1 else suite.split_runs(processes)
                tasks = [self._task(suite, run) for run in runs]
                if processes == 1:
                    tasks.insert(0, self._task(suite, None))
                place = places[index % len(places)]
                chains.append(self._chain(suite.folder.name, processes, place, tasks))
        if not options.without_transformers:
            tasks = [self._parity_task(dtype) for dtype in options.dtypes]
            place = self.place.split(options.processes, options.processes)[0]
            chains.append(self._chain("transformers", options.processes, place, tasks))
        return chains

    def _chain(self, name: str, processes: int, place: Place, tasks: list[Task]) -> Chain:
        return Chain(self.work / f"{name}_{processes}.log", tasks, processes, place)

    def _task(self, suite: Suite, run: Run | None) -> Task:
        """A training; of the checkpoint that all begin with, without a run."""
        lengths = suite.lengths
        stop = lengths.start if run is None else lengths.end
        folder = suite.run_folder(START if run is None else run.name)
        words = [
            *("--config-dir", str(CONFIG_DIR), "experiment=small"),
            *(f"output_dir={suite.folder}", f"run_name={folder.name}"),
            *(f"data.cache_dir={self.cache_dir}", *suite.overrides, f"stop_after_step={stop}"),
        ]
        if run is None:
            return Task(folder, tuple(words))
        source = START if run.resumes is None else run.resumes
        step = lengths.start if run.resumes is None else lengths.middle
        words += [*run.overrides, f"checkpoint.load={suite.saved(source, step)}"]
        logits = None
        # The model's logits do not depend on who trains it.
        if run.resumes is None and suite.optimizer == self.options.optimizers[0]:
            layout = [word for word in run.overrides if word.startswith(("parallel.", "kernels."))]
            logits = LogitsJob(
                str(suite.saved(START, lengths.start)),
                str(self.work / "tokens.pt"),
                str(folder / "logits.pt"),
                [f"precision.compute={suite.dtype}", *layout],
            )
        return Task(folder, tuple(words), run.seed, logits, after=suite.run_folder(source))

    def _convert(self) -> subprocess.Popen[bytes]:
        folder = self.work / "transformers"
        folder.mkdir()
        words = [str(folder), str(self.cache_dir)]
        if self.place.on_cuda:
            words += CUDA_BF16_MODEL
        with (self.work / "transformers.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.multi_gpu.hugging_face", *words],
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=log,
            )

    def _parity_task(self, dtype: str) -> Task:
        folder = self.work / "transformers"
        layout = f"parallel.expert_parallel_size={self.options.processes}"
        logits = LogitsJob(
            str(folder / "checkpoint"),
            str(folder / "tokens.pt"),
            str(folder / f"ours_{dtype}.pt"),
            [f"precision.compute={dtype}", layout],
        )
        return Task(folder / f"of_{dtype}", logits=logits, after=folder)

    def due(self) -> list[Due]:
        """Of every run in a layout, and of the model of transformers'."""
        due = []
        for suite in self.suites:
            singles = [suite.run_folder(run.name) for run in suite.references()]
            for run in suite.split_runs(*self.counts):
                title = f"{suite.title}, {run.name}"
                folders = [*singles, suite.run_folder(run.name)]
                due.append(Due(title, folders, partial(self._verdicts, suite, run)))
        if not self.options.without_transformers:
            over = f"experts over {self.options.processes} processes"
            for dtype in self.options.dtypes:
                title = f"{dtype}, transformers' model with {over}"
                folder = self.work / "transformers" / f"of_{dtype}"
                due.append(Due(title, [folder], partial(self._parity, title, dtype)))
        return due

    def _verdicts(self, suite: Suite, run: Run) -> list[Verdict]:
        if suite not in self.noise:
            self.noise[suite] = noise_of(suite)
        return verdicts(suite, run.name, self.noise[suite])

    def _parity(self, name: str, dtype: str) -> list[Verdict]:
        folder = self.work / "transformers"
        ours, exact = torch.load(folder / f"ours_{dtype}.pt"), torch.load(folder / "fp32.pt")
        ours = ours[..., : exact.shape[-1]]
        if dtype == "fp32":
            largest = largest_difference(ours, exact)
            return [Verdict(name, "logits (largest)", largest, 1e-4, "of the tests")]
        # Where rounding sends a token to other experts, its logits are others altogether.
        difference, own = (
            float((each - exact).abs().amax(-1).median())
            for each in (ours, torch.load(folder / f"{dtype}.pt"))
        )
        source = f"{NOISE_FACTOR:.0f} x transformers' own difference of {dtype} to fp32"
        what = "logits (largest of a token, median)"
        return [Verdict(name, what, difference, NOISE_FACTOR * own, source)]

    def write(self) -> tuple[str, list[Result]]:
        """Write the card with all that is known; returns its summary, and what is not well."""
        found = self.comparisons.results(self.failures)
        passed = [each for each in found if isinstance(each, Verdict) and each.passes]
        failed = [each for each in found if isinstance(each, Verdict) and not each.passes]
        words = [each for each in found if isinstance(each, str)]
        summary = (
            f"{len(passed)} comparisons passed, {len(failed)} failed, {len(words)} runs were not"
            " compared"
        )
        notes = [summary, *map(str, failed), *words, *self.kernels(), *NOTES]
        write_card(self.options.name, rows_of(found), self.options.results_dir, notes)
        return summary, [*failed, *words]

    def kernels(self) -> list[str]:
        """Which kernels the runs said they used."""
        said = set()
        lines = re.compile(r"^(?:kernels(?: of the \w+)?|linear layers): .*$", re.MULTILINE)
        for path in self.work.glob("*.log"):
            said |= set(lines.findall(path.read_text()))
        return sorted(said)


def rows_of(found: Sequence[Result]) -> list[Row]:
    """Rows of a card: the tolerance is the peer, and a ratio above 1 is within it."""
    return [
        Row(
            f"{each.runs}: {each.what}",
            UNITS.get(each.what.partition(" (")[0], "relative difference"),
            each.difference,
            f"tolerance {each.source}",
            each.tolerance,
            each.tolerance / each.difference if each.difference else None,
        )
        for each in found
        if isinstance(each, Verdict)
    ]


def main(arguments: list[str] | None = None, began: float | None = None) -> int:
    """Run and compare within the time, print and write the card.

    Args:
        arguments: of the command line.
        began: of `time.monotonic`, when the time began; by default now.
    """
    options = parse_arguments(arguments)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        comparison = Comparison(options, work, time.monotonic() if began is None else began)
        comparison.run()
        summary, not_well = comparison.write()
    print("\n".join(map(str, [*not_well, summary])))
    print(options.results_dir / f"{options.name}.json")
    return 1 if not_well else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    words = "numbers of processes of the layouts; by default 1, 2, 4, … up to --processes"
    parser.add_argument("--counts", type=int, nargs="+", default=[], help=words)
    words = "starts that run at a time; by default all on GPUs, and one on a CPU"
    parser.add_argument("--at-once", type=int, default=0, help=words)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--layouts", nargs="+", default=[], help="by name; by default all")
    parser.add_argument("--without-transformers", action="store_true", help="layouts alone")
    parser.add_argument("--cache-dir", type=Path, help="where the tokenizer may be already")
    parser.add_argument("--tiny", action="store_true", help="three steps, to try the script")
    parser.add_argument("--work", type=Path, help="empty folder to keep what the runs write")
    parser.add_argument("--seconds", type=float, default=1200.0, help="for everything")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    starts.end_all_with_me()
    sys.exit(main(began=BEGAN))
