"""Running the main job under torchrun while its processes are killed, frozen or signalled."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kanana.config.exit_status import SAVED_FOR_ANOTHER_START
from megatron_kanana.config.saved import whole_steps
from tests.faults.train_observed import read_state
from tests.launch import ROOT

DELAYS = {"starting": 2.0, "step": 0.2, "saving": 0.1, "background": 0.03, "evaluation": 0.05}
"""When a phase is met, the kill comes after a random part of these seconds."""

VICTIMS = {"rank": 80, "all ranks": 8, "torchrun": 7, "writer": 5}
"""Whom a kill hits, in percent. A writer is the process of a save in the background."""

MOST_STEPS = 5
"""Steps from the newest checkpoint to the next kill, at most."""

_POLL_SECONDS = 0.002
_LIMIT_SECONDS = 900.0
_ORPHAN_SECONDS = 5.0


@dataclass
class Kill:
    """One SIGKILL, SIGSTOP or SIGUSR1.

    Attributes:
        wanted: phase that was waited for.
        phase: what the victim was doing when it was killed; background is a step beside a save.
        victim: key of `VICTIMS`.
        step: of the victim.
        at: seconds since 1970.
        left_seconds: until all had saved and left, after SIGUSR1.
        restart_seconds: until the first step after it began; None where another kill came before.
    """

    wanted: str
    phase: str
    victim: str
    rank: int
    step: int
    restart_seconds: float | None = None
    at: float = 0.0
    left_seconds: float | None = None


class DisturbedRun:
    """The main job on some processes, started again until it ends by itself.

    Args:
        folder: gets what the run tells of itself, and its log.
        run_dir: folder of the run.
        arguments: of the main job.
        processes: of the run.
        kills: signals to send at most; none are left when the run ends before.
        randomness: chooses phases, delays and victims.
        number: what is sent. SIGSTOP freezes single ranks during steps;
            SIGUSR1 makes all save and leave.
    """

    def __init__(
        self,
        folder: Path,
        run_dir: Path,
        arguments: Sequence[str],
        processes: int,
        kills: int,
        randomness: random.Random,
        number: signal.Signals = signal.SIGKILL,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.run_dir = run_dir
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self._command = [
            *(sys.executable, "-m", "megatron_kanana.cluster.launch", "--standalone"),
            *(f"--nproc-per-node={processes}", f"--max-restarts={2 * kills + 5}"),
            *("--start-method=fork", "--run-path", str(ROOT / "tests/faults/train_observed.py")),
            *(str(folder), *arguments),
        ]
        self._in_background = "checkpoint.asynchronous=false" not in arguments
        self._processes = processes
        self._wanted_kills = kills
        self._random = randomness
        self._number = number
        self._killed_at = 0.0
        self._dead: set[int] = set()
        self._not_before = 0
        self._sessions: list[int] = []

    def run(self) -> None:
        """Start, kill, start again, to the end of the run."""
        end = time.monotonic() + _LIMIT_SECONDS
        with contextlib.ExitStack() as leaving, (self.folder / "log").open("a") as log:
            launcher = self._start(log.fileno())
            leaving.callback(self._end)
            plan = self._plan()
            while True:
                if launcher.poll() is not None:
                    if launcher.returncode == 0:
                        break
                    if launcher.returncode == SAVED_FOR_ANOTHER_START and self.kills:
                        self.kills[-1].left_seconds = time.monotonic() - self._killed_at
                    elif launcher.returncode != -signal.SIGKILL:
                        self.problems.append(f"torchrun ended with {launcher.returncode}")
                        break
                    self._wait_for_orphans()
                    launcher = self._start(log.fileno())
                if time.monotonic() > end:
                    self.problems.append(f"no end after {_LIMIT_SECONDS:.0f} s")
                    break
                self._note_restart()
                if len(self.kills) < self._wanted_kills and self._meets(plan):
                    time.sleep(self._random.uniform(0.0, DELAYS[plan.wanted]))
                    if self._kill(plan, launcher):
                        plan = self._plan()
                time.sleep(_POLL_SECONDS)
            self._look_for_leftovers()

    def _start(self, log: int) -> subprocess.Popen[bytes]:
        self._launcher = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._sessions.append(self._launcher.pid)
        return self._launcher

    def _end(self) -> None:
        if self._launcher.poll() is None:
            os.killpg(self._launcher.pid, signal.SIGKILL)
            self._launcher.wait()

    def _plan(self) -> Kill:
        victim = self._random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        phases = [phase for phase in DELAYS if phase != "evaluation"]  # few runs have many
        if not self._in_background:
            phases.remove("background")
            victim = "rank" if victim == "writer" else victim
        if self.kills and self.kills[-1].victim == "writer":
            phases.remove("starting")  # nothing starts again
        wanted = self._random.choice(phases) if victim != "writer" else "background"
        if self._number == signal.SIGSTOP:
            victim, wanted = "rank", "step"
        elif self._number == signal.SIGUSR1:
            victim, wanted = "rank", self._random.choice(["step", "saving", "evaluation"])
        rank = self._random.randrange(self._processes)
        # Else all kills would come at the first steps.
        saved = max(whole_steps(self.run_dir / "checkpoints"), default=0)
        at_once = wanted in ("starting", "evaluation")
        self._not_before = 0 if at_once else saved + self._random.randint(1, MOST_STEPS)
        return Kill(wanted, wanted, victim, rank, 0)

    def _phase(self, rank: int) -> tuple[int, str, int] | None:
        """Process number, phase and step of a rank that lives."""
        state = read_state(self.folder, rank)
        if state is None or state[0] in self._dead or not _lives(state[0]):
            return None
        pid, phase, step = state
        if phase == "step" and any(self.run_dir.glob("checkpoints/*.partial")):
            phase = "background"
        return pid, phase, step

    def _meets(self, plan: Kill) -> bool:
        state = self._phase(plan.rank)
        return state is not None and state[1] == plan.wanted and state[2] >= self._not_before

    def _kill(self, plan: Kill, launcher: subprocess.Popen[bytes]) -> bool:
        """Whether somebody was killed."""
        state = self._phase(plan.rank)
        if state is None or launcher.poll() is not None:
            return False
        if self._number == signal.SIGSTOP and (state[1] == "saving" or state[2] < 2):
            return False  # saves and first steps have a limit of their own
        pid, plan.phase, plan.step = state
        pids = [pid]
        if plan.victim == "all ranks":
            pids = [each[0] for each in map(self._phase, range(self._processes)) if each]
        elif plan.victim == "torchrun":
            pids = [launcher.pid]
        elif plan.victim == "writer":
            pids = list(_children(pid))
            if not pids:
                return False
        self._killed_at, plan.at = time.monotonic(), time.time()
        for each in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, self._number)
        if plan.victim == "writer":  # the run may go on without it
            self.kills.append(plan)
            return True
        self._dead |= {each[0] for each in map(self._phase, range(self._processes)) if each}
        if plan.victim == "torchrun":
            launcher.wait()
        self.kills.append(plan)
        return True

    def _note_restart(self) -> None:
        last = self.kills[-1] if self.kills else None
        if last is None or last.victim == "writer" or last.restart_seconds is not None:
            return
        states = [self._phase(rank) for rank in range(self._processes)]
        if all(state is not None and state[1] != "starting" for state in states):
            last.restart_seconds = time.monotonic() - self._killed_at

    def _look_for_leftovers(self) -> None:
        """The run is over: no process may be left of it, nor of those that were killed."""
        time.sleep(0.5)
        sessions = set(self._sessions)
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = path.read_text().rpartition(")")[2].split()
                if int(status[3]) in sessions and status[0] != "Z":
                    self.problems.append(f"process {path.parent.name} outlives the run")
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def _wait_for_orphans(self) -> None:
        """torchrun is dead: none of its processes may go on beside those of the next one."""
        states = [read_state(self.folder, rank) for rank in range(self._processes)]
        end = time.monotonic() + _ORPHAN_SECONDS
        for state in states:
            while state is not None and _lives(state[0]):
                if time.monotonic() > end:
                    self.problems.append(f"process {state[0]} outlives torchrun")
                    os.kill(state[0], signal.SIGKILL)
                time.sleep(_POLL_SECONDS)


def _lives(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError):
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
