"""Starting the main job in processes of its own, with a time limit."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.forked_job import run_forked

ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = ROOT / "tests" / "configs"
TIMEOUT_SECONDS = 300


@dataclass
class Finished:
    """A process that has ended, with what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_python(
    *arguments: str,
    processes: int = 1,
    timeout: float = TIMEOUT_SECONDS,
    behind: Sequence[str] = (),
    anew: bool = False,
) -> Finished:
    """Run a program on one process or several; everything is killed at the time limit.

    Args:
        arguments: of Python.
        processes: number of processes.
        timeout: seconds.
        behind: a command that starts Python.
        anew: start Python, or torchrun, as a user does. Otherwise, without `behind` and where
            there is no GPU, processes are forked from one that has loaded torch, which takes a
            quarter of the time; CUDA does not bear it.
    """
    if not (anew or behind or torch.cuda.is_available()):
        return Finished(*run_forked(arguments, environment(), processes, timeout))
    launcher: list[str] = []
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher = ["-m", *launcher]
    process = start_python(*launcher, *arguments, behind=behind)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{stdout}\n{stderr}") from None
    return Finished(process.returncode, stdout, stderr)


def start_python(*arguments: str, behind: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start Python in a session of its own; its output is caught."""
    return subprocess.Popen(
        [*behind, sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def environment() -> dict[str, str]:
    """Variables of what is started."""
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}


def train(
    output_dir: Path, cache_dir: Path, run_name: str, *overrides: str, processes: int = 1
) -> list[dict[str, Any]]:
    """Run the main job on the small test model; the records of its metrics.jsonl."""
    arguments = _arguments(output_dir, cache_dir, run_name, overrides)
    finished = run_python("-m", "megatron_kanana.train", *arguments, processes=processes)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return _records(output_dir, run_name)


def train_in_turn(
    output_dir: Path,
    cache_dir: Path,
    runs: Mapping[str, Sequence[str]],
    *,
    processes: int = 1,
    timeout: float = TIMEOUT_SECONDS,
    script: Sequence[str] = ("tests/train_in_turn.py",),
) -> dict[str, list[dict[str, Any]]]:
    """As `train`, for several runs one after another in the same processes.

    Starting a process takes longer than a small run. Each run builds everything anew; choose
    `train` where one could leave something behind for the next.

    Args:
        runs: overrides by name of the run.
        script: what runs them, with its first arguments.

    Returns:
        records by name of the run.
    """
    jobs = [
        [port, _arguments(output_dir, cache_dir, name, overrides)]
        for port, (name, overrides) in zip(free_ports(len(runs)), runs.items(), strict=True)
    ]
    finished = run_python(*script, json.dumps(jobs), processes=processes, timeout=timeout)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return {name: _records(output_dir, name) for name in runs}


def _arguments(
    output_dir: Path, cache_dir: Path, run_name: str, overrides: Sequence[str]
) -> list[str]:
    return [
        *("--config-dir", str(CONFIG_DIR), "experiment=small"),
        f"output_dir={output_dir}",
        f"data.cache_dir={cache_dir}",
        f"run_name={run_name}",
        *overrides,
    ]


def _records(output_dir: Path, run_name: str) -> list[dict[str, Any]]:
    lines = (output_dir / run_name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on.

    They lie below those the system gives to outgoing connections, which could take one before it
    is listened on.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports
