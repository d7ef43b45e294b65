"""Predictions of the planner beside measurements: a slice of kanana_2_30b_a3b on one GPU.

python -m benchmarks.planner_calibration --name planner_calibration_h200

Steps of MuonClip on random tokens are timed in each setting: the groups of `precision`, each with
every choice of what is computed again. The card has, with what `megatron_kanana.planning` predicts
as peer: a step, its passes alone (forward and backward, all microbatches), peak memory, and memory
between steps; and how long the host takes to launch a microbatch's passes. On a CPU, for which
nothing is predicted, there are times alone. `python -m tools.plan --errors` reads the cards
planner_calibration_h100 and planner_calibration_h200.

A setting that fails is noted, and the others run. What was measured is printed, and the card
written anew, after each. Processes start all at once and wait for their turn on the GPU, as each
takes longer to start than to measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_kanana.config import Settings
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from megatron_kanana.planning.calibration import KANANA
from megatron_kanana.planning.errors import UPDATE_PARTS
from megatron_kanana.planning.machines import MACHINES, Machine
from megatron_kanana.planning.plan import Plan, job_of, plan

from .card import RESULTS_DIR, Row, reason, write_card
from .optimizer_step import random_microbatches
from .several_runs import OneProcess, settings_of

PRECISIONS = ("bf16", "fp8_blockwise", "fp8_blockwise_experts")
RECOMPUTE = {
    "none": ("parallel.recompute=none",),
    "full": ("parallel.recompute=full",),
    "parts": (
        "parallel.recompute=selective",
        "parallel.recompute_parts=[norms,up_projections]",
    ),
}
WARM_UP = 2
LONGEST_SECONDS = 120.0
"""That a setting may take."""
GIB = 2**30


def main(arguments: list[str] | None = None) -> None:
    """Measure every setting and write the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--model", default="kanana_2_30b_a3b", help="of which a slice is taken")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=2, help="of a microbatch")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=5, help=f"timed, after {WARM_UP} that are not")
    parser.add_argument(
        "--precisions", nargs="+", default=PRECISIONS, help="groups of `precision`; fp8 needs a GPU"
    )
    parser.add_argument("--recompute", nargs="+", default=[*RECOMPUTE], choices=RECOMPUTE)
    parser.add_argument(
        "--attention", nargs="+", default=["csrc"], choices=("csrc", "sdpa"), help="on a GPU"
    )
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the built-in tokenizer")
    parser.add_argument("--cache-dir", type=Path, help="where that tokenizer may be already")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    cases = itertools.product(
        options.attention if on_gpu else ("auto",),
        options.recompute,
        options.precisions if on_gpu else ("auto",),
    )
    rows: list[Row] = []
    notes = [
        f"{options.layers} layers of {options.model}, {options.microbatches} microbatches of"
        f" {options.sequences} x {options.sequence_length} tokens, {options.optimizer}."
    ]
    with tempfile.TemporaryDirectory() as folder:
        options.cache_dir = options.cache_dir or Path(folder)
        waiting = [Case(*case, options) for case in cases]
        # Random tokens need no tokenizer beside the vocabulary's size; the settings ask for one.
        prepare_builtin_data(
            builtin_data(options.cache_dir, options.vocabulary), options.vocabulary
        )
        for case in waiting:
            found = case.result()
            if isinstance(found, str):
                notes.append(f"not run: {case.name}: {found}")
                print(notes[-1], flush=True)
            else:
                rows += found
                for row in found:
                    print(row.name, f"{row.ours:.4f} {row.unit}", row.peer_value, flush=True)
            path = write_card(options.name, rows, options.results_dir, notes)
    print(path)


class Case:
    """One setting in a process of its own, which leaves no memory behind; starts it.

    Attributes:
        name: for rows and notes.
    """

    def __init__(
        self, attention: str, recompute: str, precision: str, options: argparse.Namespace
    ) -> None:
        words = [] if attention == "auto" else [precision, f"attention {attention}"]
        self.name = ", ".join([*words, f"recompute {recompute}"])
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        arguments = (theirs, self.name, attention, recompute, precision, options)
        self._process = context.Process(target=_take_turn, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> list[Row] | str:
        """Let it measure, and wait: its rows, or why there are none."""
        try:
            self._ours.send("go")
            if not self._ours.poll(LONGEST_SECONDS):
                return f"takes more than {LONGEST_SECONDS:.0f} s"
            found: list[Row] | str = self._ours.recv()
            return found
        except (EOFError, OSError):
            self._process.join(5)
            return f"its process ended with status {self._process.exitcode}"
        finally:
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()


def _take_turn(
    connection: Connection,
    name: str,
    attention: str,
    recompute: str,
    precision: str,
    options: argparse.Namespace,
) -> None:
    found: list[Row] | str
    try:
        settings = _settings(attention, recompute, precision, options)
        process = OneProcess(settings)
        import megatron_kanana.training.step  # noqa: F401
    except Exception as error:  # the other settings run nevertheless
        found = reason(error)
        connection.recv()
    else:
        connection.recv()
        try:
            found = measure(name, settings, process, options)
        except Exception as error:
            found = reason(error)
    connection.send(found)


def _settings(
    attention: str, recompute: str, precision: str, options: argparse.Namespace
) -> Settings:
    kernels = [f"kernels.backend={attention}"]
    if torch.cuda.is_available():
        kernels += ["kernels.moe_backend=csrc", "kernels.loss_backend=csrc"]
        kernels += ["kernels.norm_backend=csrc"]
        kernels += ["kernels.linear_backend=te", "kernels.rope_backend=triton"]
    settings = settings_of(
        [
            *(f"model={options.model}", f"model.num_layers={options.layers}"),
            f"model.vocab_size={options.vocabulary}",
            *(f"optimizer={options.optimizer}", *RECOMPUTE[recompute], *kernels),
            *(f"data.cache_dir={options.cache_dir}", f"precision={precision}"),
            f"data.sequence_length={options.sequence_length}",
            f"schedule.micro_batch_size={options.sequences}",
            f"schedule.global_batch_size={options.sequences * options.microbatches}",
        ]
    )
    settings.data.tokenizer = str(builtin_data(options.cache_dir, options.vocabulary).tokenizer)
    if torch.cuda.is_available():
        settings.model.vocab_size = 128256
    return settings


def measure(
    name: str, settings: Settings, process: OneProcess, options: argparse.Namespace
) -> list[Row]:
    """Rows of one setting."""
    run = process.build(settings)

    from megatron_kanana.training.step import run_schedule, train_step

    iterators = [random_microbatches(settings)]

    def step() -> None:
        train_step(run, iterators)

    def passes(microbatches: int = options.microbatches) -> None:
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run_schedule(run, iterators, microbatches, forward_only=False)

    steps = [_seconds(step)[1] for _ in range(WARM_UP + options.steps)][WARM_UP:]
    memory = _memory()
    repeats = max(2, options.steps // 2)
    of_passes = [_seconds(passes)[1] for _ in range(repeats)]
    # A single one: with more, the queue of launches is full, and the host waits for the GPU.
    of_host = [_seconds(partial(passes, 1))[0] for _ in range(repeats)]
    found = prediction(settings)
    predicted = None
    if found is not None:
        predicted = found.step, found.step - sum(found.parts[part] for part in UPDATE_PARTS)
    timed = (statistics.median(steps), statistics.median(of_passes))
    rows = []
    for index, part in enumerate(("step", "passes")):
        peer_value = None if predicted is None else predicted[index]
        runs = options.steps if part == "step" else repeats
        rows.append(_row(f"{name}: {part}", "s", timed[index], peer_value, runs))
    host = statistics.median(of_host)
    rows.append(Row(f"{name}: host's part of a microbatch", "s", host, runs=repeats))
    if memory is not None:
        between, peak = (size / GIB for size in memory)
        peer_value = None if found is None else found.peak_memory / GIB
        rows.append(_row(f"{name}: peak memory", "GiB", peak, peer_value, 1))
        peer_value = None if found is None else found.memory[0].held / GIB
        rows.append(_row(f"{name}: memory between steps", "GiB", between, peer_value, 1))
    return rows


def _seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Until an idle GPU was given the work, and until it was done."""
    _synchronize()
    start = time.perf_counter()
    work()
    launched = time.perf_counter() - start
    _synchronize()
    return launched, time.perf_counter() - start


def _memory() -> tuple[int, int] | None:
    """Bytes allocated now, and at most so far; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def prediction(settings: Settings) -> Plan | None:
    """What the planner says about this GPU; None where it does not know it."""
    machine = this_machine()
    if machine is None:
        return None
    job = job_of(settings, 1, machine, KANANA)
    return plan(job, settings.optimizer)


def this_machine() -> Machine | None:
    """The description of the GPU at hand, with the host that calibration was made on."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    known = next((machine for key, machine in MACHINES.items() if key in name), None)
    return known and dataclasses.replace(known, host_time=1.0)


def _row(name: str, unit: str, measured: float, predicted: float | None, runs: int) -> Row:
    peer = None if predicted is None else "megatron_kanana.planning"
    return Row(name, unit, measured, peer, predicted, runs=runs)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
