"""A training under the project's launcher, one of whose ranks is killed in the middle."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kanana.config.saved import whole_steps
from megatron_kanana.training.records import read_records

from . import starts
from .starts import Place

_POLL_SECONDS = 0.05


@dataclass
class Told:
    """What came of the training.

    Attributes:
        failure: what went wrong, or an empty text.
        rank: that was killed; None if nobody was.
        step: done when it was.
        before: records of that moment.
        seconds_lost: from the kill until the first step after it was done.
    """

    failure: str = ""
    rank: int | None = None
    step: int = 0
    before: list[dict[str, Any]] = field(default_factory=list)
    seconds_lost: float | None = None


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """Records of the steps that a run has done."""
    return [record for record in read_records(run_dir / "metrics.jsonl") if "loss" in record]


def watch(
    words: Sequence[str], place: Place, log: Path, seconds: float, seen: Callable[[], bool]
) -> str:
    """Run until something is seen, then end it; what went wrong, or an empty text."""
    end = time.monotonic() + seconds
    with starts.started(words, place, log) as process:
        while not seen():
            if process.poll() is not None:
                return f"ended with {process.returncode}: {starts.last_error(log)}"
            if time.monotonic() > end:
                return f"saw nothing in {seconds:.0f} s"
            time.sleep(_POLL_SECONDS)
    return ""


def run_with_a_kill(
    words: Sequence[str],
    place: Place,
    log: Path,
    run_dir: Path,
    *,
    processes: int,
    kill_step: int,
    seconds: float,
) -> Told:
    """Run to the end; SIGKILL a random rank once a step and a whole checkpoint are done."""
    told = Told()
    end = time.monotonic() + seconds
    killed_at, was_set_back = 0.0, False
    with starts.started(words, place, log) as process:
        while process.poll() is None:
            if time.monotonic() > end:
                told.failure = f"no end after {seconds:.0f} s"
                return told
            time.sleep(_POLL_SECONDS)
            done = steps_of(run_dir)
            last = done[-1]["step"] if done else 0
            if told.rank is None:
                ranks = rank_processes(process.pid)
                saved = whole_steps(run_dir / "checkpoints")
                if last >= kill_step and saved and len(ranks) == processes:
                    told.rank, told.step, told.before = random.randrange(processes), last, done
                    os.kill(ranks[told.rank], signal.SIGKILL)
                    killed_at = time.monotonic()
            elif told.seconds_lost is None:
                if was_set_back and last > max(whole_steps(run_dir / "checkpoints"), default=0):
                    told.seconds_lost = time.monotonic() - killed_at
                was_set_back = was_set_back or last < told.step
        if process.returncode:
            told.failure = f"ended with {process.returncode}: {starts.last_error(log)}"
    return told


def rank_processes(launcher: int) -> list[int]:
    """Process numbers of a launcher's ranks, in their order."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_text()
            if parent == launcher and "megatron_kanana" in words:
                found.append(int(path.name))
    return sorted(found)
