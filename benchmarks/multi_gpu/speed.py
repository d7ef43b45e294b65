"""Speed of a slice of a model over GPUs of one host, beside megatron-core with Transformer Engine.

python -m benchmarks.multi_gpu.speed --processes 1 2 4 --name speed_4_h100

The same slice, with experts over all processes and as many tokens a process, runs on each number
of processes, one after another: all start at once and wait for their turn. The card has tokens a
second and process, the part of a step that communication takes (docs/multi_gpu.md), bandwidth of
all-to-alls, and scaling efficiency.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import RESULTS_DIR, Row, write_card
from megatron_kanana.config import Environment, Settings, load_settings

from . import BEGAN, memory, starts
from .starts import Place

MODULE = "benchmarks.multi_gpu.slice_steps"
TINY = ("kanana_2_tiny", 3, 2, 64)
"""Model, layers, sequences and their length, to try the script."""
Found = dict[str, Any]


def step_options(parser: argparse.ArgumentParser) -> None:
    """Options that the processes take too."""
    parser.add_argument("--model", default="kanana_2_30b_a3b", help="of which a slice is taken")
    parser.add_argument("--layers", type=int, default=0, help="0 takes what fits on one GPU")
    parser.add_argument("--sequences", type=int, default=4, help="of a microbatch")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=1, help="of a step")
    parser.add_argument("--rounds", type=int, default=5, help="how often all take their turn")
    parser.add_argument("--repeats", type=int, default=3, help="steps a turn, without a wait")
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings")


def slice_settings(options: argparse.Namespace, environment: Environment) -> Settings:
    """Settings of a slice with experts over all processes."""
    words = [
        *(f"model={options.model}", f"model.num_layers={options.layers}", "optimizer=muon"),
        f"parallel.expert_parallel_size={environment.world_size}",
        "parallel.overlap_gradient_reduction=true",
        f"data.sequence_length={options.sequence_length}",
        f"schedule.micro_batch_size={options.sequences}",
        f"schedule.global_batch_size={options.sequences * environment.world_size}",
        *options.overrides,
    ]
    return load_settings(words, environment, with_files=False)


def measured(options: argparse.Namespace, work: Path, end: float) -> dict[int, Found | str]:
    """What each number of processes found until `end`, or why it found nothing."""
    found: dict[int, Found | str] = {}
    names = ["model", "layers", "sequences", "sequence_length", "microbatches", "rounds", "repeats"]
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    words += ["--overrides", *options.overrides]
    on_cuda = options.device == "cuda"
    with contextlib.ExitStack() as stack:
        waiting = []
        for processes in options.processes:
            output = work / f"speed_{processes}.json"
            log, turn = output.with_suffix(".log"), output.with_suffix(".turn")
            place = Place(on_cuda, tuple(range(processes)) if on_cuda else ())
            arguments = [f"--output={output}", f"--turn={turn}", *words]
            if options.ours_alone:
                arguments.insert(0, "--ours-alone")
            elif processes == max(options.processes):
                arguments.insert(0, "--all-peers")
            command = starts.command(MODULE, arguments, processes, place)
            process = stack.enter_context(starts.started(command, place, log))
            waiting.append((processes, process, output, log, turn))
        for index, (processes, process, output, log, turn) in enumerate(waiting):
            turn.touch()
            share = (end - time.monotonic()) / (len(waiting) - index)
            failure = starts.wait(process, log, share)
            if process.poll() is None:
                starts.end(process)
            if not output.exists():
                found[processes] = failure
                continue
            of_these: Found = json.loads(output.read_text())
            if failure:
                of_these["not run"].append(f"the rest: {failure}")
            found[processes] = of_these
    return found


def rows_of(processes: int, found: Found, tokens: int) -> list[Row]:
    """Rows of one number of processes."""
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    label = f"{processes} process{'es' if processes > 1 else ''}"
    rows = []
    peers = {
        name.removesuffix(": step"): value
        for name, value in medians.items()
        if name.endswith(": step") and not name.startswith("ours")
    }
    ours = medians["ours: step"]
    runs = len(found["seconds"]["ours: step"])
    unit = "tokens/s/process"
    for peer, value in peers.items():
        name = f"{label}: forward and backward"
        rows.append(Row(name, unit, tokens / ours, peer, tokens / value, value / ours, runs))
    if not peers:
        rows.append(Row(f"{label}: forward and backward", unit, tokens / ours, runs=runs))
    for name, value in medians.items():
        rows.append(Row(f"{label}, {name}", "ms", 1e3 * value, runs=runs))
    for contender in ("ours", *peers):
        times = [medians.get(f"{contender}: {kind}") for kind in _KINDS]
        step, local, alone = times
        if step and local and alone:
            for what, part in (("all-to-all", step - local), ("gradient reduction", local - alone)):
                name = f"{label}, {contender}: {what} that is not hidden"
                rows.append(Row(name, "% of a step", 100 * part / step, runs=runs))
    even = "the same bytes, even"
    unit = "GB/s away from a process"
    for name, value in found["bandwidth"].items():
        row = Row(f"{label}: all-to-all, {name}", unit, value)
        if name == "as the step sends them":
            row.peer, row.peer_value = even, found["bandwidth"][even]
            row.ratio = value / found["bandwidth"][even]
        rows.append(row)
    for name, value in found["peak GiB"].items():
        rows.append(Row(f"{label}: peak memory, {name}", "GiB", value))
    return rows


_KINDS = ("step", "all-to-all as local copies", "besides, gradients not reduced")


def efficiency_rows(found: dict[int, Found | str]) -> list[Row]:
    """Time of a step on one process over that on several, with the same work on each."""
    of = {processes: each for processes, each in found.items() if not isinstance(each, str)}
    if 1 not in of:
        return []
    base = statistics.median(of[1]["seconds"]["ours: step"])
    return [
        Row(
            f"scaling efficiency, 1 -> {processes}",
            "%",
            100 * base / statistics.median(each["seconds"]["ours: step"]),
        )
        for processes, each in of.items()
        if processes > 1
    ]


def main(arguments: list[str] | None = None, began: float | None = None) -> int:
    """Measure, print and write the card; exit code 1 if a number of processes found nothing.

    Args:
        arguments: of the command line.
        began: of `time.monotonic`, when the time began; by default now.
    """
    options = parse_arguments(arguments)
    end = (time.monotonic() if began is None else began) + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        found = measured(options, work, end)
    tokens = options.sequences * options.sequence_length
    rows = efficiency_rows(found)
    notes = [
        f"{options.layers} layers of {options.model}; {options.sequences} x"
        f" {options.sequence_length} tokens a process and microbatch, {options.microbatches} of"
        " these a step; experts over all processes; times are a microbatch's, of the slowest.",
        "Not hidden: a step, less one whose all-to-alls are copies on the process itself; then less"
        " one that also reduces no gradients.",
    ]
    for processes, each in found.items():
        if isinstance(each, str):
            notes.append(f"{processes} processes: not run: {each}")
            continue
        rows += rows_of(processes, each, tokens)
        turns = "in turns" if each["interleaved"] else "one after the other, as both do not fit"
        notes.append(f"{processes} processes: contenders {turns}; losses {each.get('loss')}")
        notes += [f"{processes} processes: not run: {reason}" for reason in each["not run"]]
    for row in rows:
        beside = f", {row.peer} {row.peer_value:.4g}" if row.peer_value is not None else ""
        print(f"{row.name}: {row.ours:.4g} {row.unit}{beside}")
    print("\n".join(notes))
    print(write_card(options.name, rows, options.results_dir, notes))
    return int(any(isinstance(each, str) for each in found.values()))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line, with the sizes that fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    step_options(parser)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--ours-alone", action="store_true", help="without the peer")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--work", type=Path, help="folder to keep logs and measurements in")
    parser.add_argument("--seconds", type=float, default=1200.0, help="for everything")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.layers, options.sequences, options.sequence_length = TINY
        options.rounds, options.repeats = 2, 1
    if not options.layers:
        model = load_settings([f"model={options.model}"], Environment(), with_files=False).model
        gpu = torch.cuda.get_device_properties(0).total_memory if options.device == "cuda" else 8e10
        tokens = options.sequences * options.sequence_length
        options.layers = memory.default_layers(model, tokens, gpu)
    return options


if __name__ == "__main__":
    starts.end_all_with_me()
    sys.exit(main(began=BEGAN))
