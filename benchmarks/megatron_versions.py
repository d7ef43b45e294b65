"""Whether two versions of megatron-core train alike: the same runs on both, step by step.

python3.12 -m pip install --no-deps --target FOLDER megatron-core==0.16.1
python3.12 -m benchmarks.megatron_versions --name megatron_versions_cpu --other FOLDER
python3.12 -m benchmarks.megatron_versions --name megatron_versions_h100 --other FOLDER --at-once 9

Before, on a CPU, the first two commands of docs/fine_tuning.md write data/tool_calls.
The installed megatron-core is compared with the one in FOLDER; Python, torch and all else are the
same. Each case is a small model, from the same seed, on the same text. On a GPU each is run once
more with half the sequences in a microbatch, which sums gradients in another order: what rounding
alone does. The card is written after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data

from .card import RESULTS_DIR, Row, reason, write_card
from .step_bench import BUILTIN_VOCABULARY
from .turns import Clock
from .version_cases import ANOTHER_ORDER, CPU_CASES, CPU_SIZES, GPU_CASES, GPU_SIZES, Case

QUIET = ("checkpoint.save_interval=0", "logging.tensorboard=false", "logging.report=false")
KERNELS = ("kernels", "linear layers", "rotary embeddings", "norms")
"""How lines of a run's log begin that say what computes."""


class RunError(Exception):
    """A run has not come to its end."""


@dataclass(frozen=True)
class Run:
    """What a run said.

    Attributes:
        records: of each step.
        kernels: lines of its log that say what computes.
    """

    records: list[dict[str, Any]]
    kernels: list[str]


def main(arguments: list[str] | None = None) -> None:
    """Train every case on both versions and write the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--other", type=Path, required=True, help="folder of the other version")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other")
    parser.add_argument("--seconds", type=float, help="time limit, after which runs are ended")
    parser.add_argument("--set", nargs="*", default=[], help="more settings, as NAME=VALUE")
    parser.add_argument("--gpu-cases", action="store_true", help="a GPU's cases on a CPU as well")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    on_gpu = options.gpu_cases or torch.cuda.is_available()
    cases, sizes = (GPU_CASES, GPU_SIZES) if on_gpu else (CPU_CASES, CPU_SIZES)
    other = options.other.resolve()
    peer = f"megatron-core {version(other)}"
    rows: list[Row] = []
    notes = [f"ours is on the megatron-core of `versions`; {options.steps} steps of each case."]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        cache = Path(folder) / "data"  # which runs beside each other would all write
        prepare_builtin_data(builtin_data(cache, BUILTIN_VOCABULARY), BUILTIN_VOCABULARY)
        common = (*sizes, f"data.cache_dir={cache}")

        def begin(case: Case, kind: str, megatron_core: Path | None, *more: str) -> Any:
            settings = (*common, *case.overrides, *options.set, *more)
            where = Path(folder) / f"{cases.index(case)} {kind}"
            return pool.submit(
                train, case.processes, settings, where, options.steps, clock, megatron_core
            )

        begun = [
            (
                case,
                begin(case, "ours", None),
                begin(case, "theirs", other),
                begin(case, "another order", None, *ANOTHER_ORDER) if on_gpu else None,
            )
            for case in cases
        ]
        for case, ours, theirs, reordered in begun:
            try:
                run = ours.result()
                notes += [note for note in run.kernels if note not in notes]
                records = None if reordered is None else reordered.result().records
                of_case = compare(case.name, run.records, theirs.result().records, peer, records)
            except RunError as error:
                notes.append(f"not run: {case.name}: {reason(error)}")
                print(notes[-1], flush=True)
            else:
                rows += of_case
                print(*of_case, sep="\n", flush=True)
            print(write_card(options.name, rows, options.results_dir, notes), flush=True)
    print(*notes, sep="\n")


def train(
    processes: int,
    settings: Sequence[str],
    folder: Path,
    steps: int,
    clock: Clock,
    megatron_core: Path | None,
) -> Run:
    """One run.

    Args:
        folder: what it writes goes here; of a new name.
        clock: ends it when nothing is left.
        megatron_core: folder of the version to use; None for the installed one.

    Raises:
        RunError: it failed, or is out of time.
    """
    schedule = (f"schedule.steps={steps}", f"schedule.decay_steps={steps // 4}")
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
    command = [sys.executable, "-m", *(launcher if processes > 1 else ()), "megatron_kanana.train"]
    command += [*schedule, *QUIET, *settings, f"output_dir={folder}", "run_name=run"]
    folder.mkdir()
    log = folder / "log"
    try:
        with log.open("w") as file:
            subprocess.run(
                command,
                check=True,
                env=environment(megatron_core),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=clock.left() if clock.limited else None,
            )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = log.read_text().splitlines()
        print(folder.name, *lines[-30:], sep="\n", flush=True)
        ended = "out of time" if isinstance(error, subprocess.TimeoutExpired) else "failed"
        raise RunError(f"{folder.name} {ended}: {' '.join(lines[-1:])}") from error
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return Run(
        [record for line in lines if "loss" in (record := json.loads(line))],
        [line for line in log.read_text().splitlines() if line.startswith(KERNELS)],
    )


def environment(megatron_core: Path | None) -> dict[str, str]:
    """Variables of a process that is to find the megatron-core in a folder first."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if megatron_core is not None:
        paths = [str(megatron_core), *filter(None, [variables.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return variables


def version(megatron_core: Path) -> str:
    """The version that such a process imports."""
    code = "import megatron.core; print(megatron.core.__version__)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    variables = environment(megatron_core)
    run = subprocess.run(command, check=True, env=variables, stdout=subprocess.PIPE, text=True)
    return run.stdout.splitlines()[-1].strip()


def compare(
    case: str,
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    peer: str,
    reordered: Sequence[dict[str, Any]] | None = None,
) -> list[Row]:
    """The last losses, and how far steps' losses and norms are away from each other.

    Args:
        ours: records of each step on one version.
        theirs: on the other, `peer`.
        reordered: on the first, with gradients summed in another order; how far it is away from
            `ours` stands as peer beside how far `theirs` is.
    """
    away = _differences(ours, theirs)
    by_rounding = {} if reordered is None else _differences(ours, reordered)
    rows = [
        Row(f"{case}: loss of step {len(ours)}", "nats", ours[-1]["loss"], peer, theirs[-1]["loss"])
    ]
    for (what, unit), value in away.items():
        row = Row(f"{case}: {what}", unit, value)
        if by_rounding:
            row.peer, row.peer_value = "rounding alone", by_rounding[what, unit]
        rows.append(row)
    return rows


def _differences(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> dict[tuple[str, str], float]:
    """By name and unit."""
    pairs = list(zip(ours, theirs, strict=True))
    of_losses = [
        abs(a - b)
        for our, their in pairs
        for a, b in zip(_losses(our), _losses(their), strict=True)
    ]
    of_norms = [abs(our["grad_norm"] / their["grad_norm"] - 1.0) for our, their in pairs]
    return {
        ("largest difference of a loss", "nats"): max(of_losses),
        ("mean difference of losses", "nats"): statistics.fmean(of_losses),
        ("largest difference of a gradient norm", "of the norm"): max(of_norms),
    }


def _losses(record: dict[str, Any]) -> list[float]:
    return [record["loss"], *record["mtp_losses"]]


if __name__ == "__main__":
    main()
