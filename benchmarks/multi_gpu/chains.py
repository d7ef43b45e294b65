"""Chains of jobs: one after another in the same processes, several chains at a time.

A chain's processes start at once and wait where a job needs what another chain writes, as starting
takes longer than most jobs. After a job that fails, its chain starts again with the next one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.launch import free_ports

from . import starts
from .jobs import DONE, FAILED, Job, LogitsJob
from .starts import Place


@dataclass(frozen=True)
class Task:
    """One job of a chain.

    Attributes:
        folder: of everything it writes; its name is the job's.
        training: arguments of the main job, without its folders.
        seed: of the order of summation.
        logits: that are computed after the training.
        after: folder of the job whose checkpoint it begins with.
    """

    folder: Path
    training: tuple[str, ...] = ()
    seed: int | None = None
    logits: LogitsJob | None = None
    after: Path | None = None

    def job(self, ports: list[int]) -> Job:
        """What the processes do."""
        after = None if self.after is None else str(self.after)
        return Job(str(self.folder), ports, after, list(self.training), self.seed, self.logits)

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return (self.folder / DONE).exists()


@dataclass(frozen=True)
class Chain:
    """Jobs that the same processes do.

    Attributes:
        log: file for what they print.
        tasks: one after another; none begins with what a later one writes.
        processes: of every start.
        place: where they run.
    """

    log: Path
    tasks: Sequence[Task]
    processes: int
    place: Place


Failures = dict[Path, str]
"""Why a task was not done, by its folder."""


def run_chains(chains: Sequence[Chain], at_once: int, end: float) -> Failures:
    """Run chains; no chain waits for a later one.

    Args:
        chains: in the order in which they start.
        at_once: how many run at a time.
        end: of `time.monotonic`; what has not ended by then is not done.
    """
    chains = [chain for chain in chains if chain.tasks]
    failures: Failures = {}
    # All ports at once: a second look for free ones could find those that nobody listens on yet.
    ports = iter(free_ports(2 * sum(len(chain.tasks) for chain in chains)))
    tasks = [task for chain in chains for task in chain.tasks]
    jobs = {task.folder: task.job([next(ports), next(ports)]) for task in tasks}
    with ThreadPoolExecutor(at_once) as pool:
        for found in pool.map(partial(_run_chain, jobs=jobs, end=end), chains):
            failures |= found
    return failures


def _run_chain(chain: Chain, *, jobs: Mapping[Path, Job], end: float) -> Failures:
    failures: Failures = {}
    waiting = list(chain.tasks)
    while waiting:
        left = end - time.monotonic()
        if left < 5.0:
            return {**failures, **{task.folder: "no time was left" for task in waiting}}
        reason = _start([jobs[task.folder] for task in waiting], chain, left)
        waiting = [task for task in waiting if not task.is_done]
        if not waiting:
            break
        failed = waiting.pop(0)
        failures[failed.folder] = reason or "left no result"
        (failed.folder / FAILED).touch()
        for task in list(waiting):
            if task.after is not None and (task.after / FAILED).exists():
                failures[task.folder] = f"{task.after.name} was not done"
                waiting.remove(task)
    return failures


def _start(jobs: Sequence[Job], chain: Chain, seconds: float) -> str:
    for job in jobs:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
    words = chain.log.with_suffix(".json")
    words.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    command = starts.command(
        "benchmarks.multi_gpu.jobs", [str(words)], chain.processes, chain.place
    )
    return starts.run(command, chain.place, chain.log, seconds)
