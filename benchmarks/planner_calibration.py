"""Predictions of the planner beside measurements: a slice of kanana_2_30b_a3b on one GPU.

python -m benchmarks.planner_calibration --name planner_calibration_h200

Steps of MuonClip on random tokens are timed in each setting that this version trains in: bf16, with
each `--attention`, with and without computing activations again. The card has step time and peak
memory of torch, and as peer what `megatron_kanana.planning` predicts for the same attention. On a
CPU, for which nothing is predicted, there are times alone, with the attention of
`kernels.backend=auto`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from megatron_kanana.config import Settings
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from megatron_kanana.planning.calibration import TORCH
from megatron_kanana.planning.machines import MACHINES, Machine
from megatron_kanana.planning.plan import Plan, job_of, plan

from .card import RESULTS_DIR, Row, write_card
from .optimizer_step import random_microbatches
from .several_runs import OneProcess, settings_of

ATTENTION = ("csrc", "sdpa")
RECOMPUTE = ("none", "full")
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
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that are not")
    parser.add_argument(
        "--attention", nargs="+", default=ATTENTION, choices=ATTENTION, help="csrc needs Hopper"
    )
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the built-in tokenizer")
    parser.add_argument("--cache-dir", type=Path, help="where that tokenizer may be already")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        options.cache_dir = options.cache_dir or Path(folder)
        backends = options.attention if torch.cuda.is_available() else ("auto",)
        for backend, recompute in itertools.product(backends, RECOMPUTE):
            if not torch.cuda.is_available():
                rows += measure(backend, recompute, options)
                continue
            # In a process of its own, which leaves no memory behind.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows += pool.submit(measure, backend, recompute, options).result()
    print(write_card(options.name, rows, options.results_dir).read_text())


def measure(backend: str, recompute: str, options: argparse.Namespace) -> list[Row]:
    """Rows of one setting."""
    settings = settings_of(
        [
            *(f"model={options.model}", f"model.num_layers={options.layers}"),
            f"model.vocab_size={options.vocabulary}",
            *(f"optimizer={options.optimizer}", f"parallel.recompute={recompute}"),
            f"kernels.backend={backend}",
            *(f"data.cache_dir={options.cache_dir}", "precision=auto"),
            f"data.sequence_length={options.sequence_length}",
            f"schedule.micro_batch_size={options.sequences}",
            f"schedule.global_batch_size={options.sequences * options.microbatches}",
        ]
    )
    tokenizer = builtin_data(options.cache_dir, options.vocabulary)
    prepare_builtin_data(tokenizer, options.vocabulary)
    # The tokens are random, so any tokenizer will do beside the model's own vocabulary.
    settings.data.tokenizer = str(tokenizer.tokenizer)
    if torch.cuda.is_available():
        settings.model.vocab_size = 128256
    run = OneProcess(settings).build(settings)

    from megatron_kanana.training.step import train_step

    iterators = [random_microbatches(settings)]
    times = []
    for _ in range(2 + options.steps):
        _synchronize()
        start = time.perf_counter()
        train_step(run, iterators)
        _synchronize()
        times.append(time.perf_counter() - start)
    step = statistics.median(times[2:])
    found = prediction(settings)
    time_predicted = None if found is None else found.step
    memory_predicted = None if found is None else found.peak_memory / GIB
    attention = "" if backend == "auto" else f"attention {backend}, "
    setting = f"{run.device.dtype}, {attention}recompute {recompute}".removeprefix("torch.")
    rows = [_row(f"{setting}: step", "s", step, time_predicted, options.steps)]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / GIB
        rows.append(_row(f"{setting}: peak memory", "GiB", peak, memory_predicted, 1))
    return rows


def prediction(settings: Settings) -> Plan | None:
    """What the planner says about this GPU; None where it does not know it."""
    machine = this_machine()
    if machine is None:
        return None
    job = job_of(settings, 1, machine, TORCH)
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
