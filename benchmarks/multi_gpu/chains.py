"""Jobs one after another in the same processes, with a new start after one that fails."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.launch import free_ports

from . import starts
from .jobs import Job, LogitsJob
from .starts import Place


@dataclass(frozen=True)
class Task:
    """One job of a chain.

    Attributes:
        folder: of everything it writes; its name is the job's.
        training: arguments of the main job, without its folders.
        seed: of the order of summation.
        logits: that are computed after the training.
        needed: whether nothing after it can be done without it.
    """

    folder: Path
    training: tuple[str, ...] = ()
    seed: int | None = None
    logits: LogitsJob | None = None
    needed: bool = False

    def job(self, ports: list[int]) -> Job:
        """What the processes do."""
        return Job(str(self.done), ports, list(self.training), self.seed, self.logits)

    @property
    def done(self) -> Path:
        """File that tells that it ended."""
        return self.folder / "done"


Failures = dict[Path, str]
"""Why a task was not done, by its folder."""


def run_chains(
    chains: Mapping[str, Sequence[Task]], processes: int, places: Sequence[Place], end: float
) -> Failures:
    """Run chains on as many places at a time as there are.

    Args:
        chains: tasks by name of the chain, which names its log.
        processes: of every start.
        places: where they run.
        end: of `time.monotonic`; what has not ended by then is not done.
    """
    free = list(places)
    failures: Failures = {}

    def run(name: str) -> None:
        place = free.pop()
        failures.update(_run_chain(name, chains[name], processes, place, end))
        free.append(place)

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(run, [name for name, tasks in chains.items() if tasks]))
    return failures


def _run_chain(
    name: str, tasks: Sequence[Task], processes: int, place: Place, end: float
) -> Failures:
    failures: Failures = {}
    waiting = list(tasks)
    log = tasks[0].folder.parent / f"{name}.log"
    while waiting:
        left = end - time.monotonic()
        if left < 5.0:
            return {**failures, **{task.folder: "no time was left" for task in waiting}}
        reason = _start(waiting, processes, place, log, left)
        waiting = [task for task in waiting if not task.done.exists()]
        if not waiting:
            break
        failed = waiting.pop(0)
        failures[failed.folder] = reason or "left no result"
        if failed.needed:
            failures |= {task.folder: f"{failed.folder.name} was not done" for task in waiting}
            break
    return failures


def _start(tasks: Sequence[Task], processes: int, place: Place, log: Path, seconds: float) -> str:
    ports = free_ports(2 * len(tasks))
    jobs = [task.job(ports[2 * index : 2 * index + 2]) for index, task in enumerate(tasks)]
    for task in tasks:
        task.folder.mkdir(parents=True, exist_ok=True)
    words = log.with_suffix(".json")
    words.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    command = starts.command("benchmarks.multi_gpu.jobs", [str(words)], processes, place)
    return starts.run(command, place, log, seconds)
