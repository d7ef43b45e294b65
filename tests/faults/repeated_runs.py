"""One run in three ways, each in processes of its own: as it is, again, and killed in the middle.

Their weights, the optimizer's state and what they record must have the same bits. The first saves
its checkpoints in the background, the second waits for them, so that these are compared as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kanana.config.saved import whole_path, whole_steps
from megatron_kanana.training.records import read_records
from tests.checkpoints import saved_tensors
from tests.faults.undisturbed import different_records, different_tensors
from tests.launch import CONFIG_DIR, ROOT

STEPS, SAVE_INTERVAL = 16, 3
KILL_STEP, KILL_DELAY = 8, 0.3
"""SIGKILL comes after this step, and after a random part of these seconds."""

LIMIT_SECONDS = 240.0
_POLL_SECONDS = 0.005

FIRST, AGAIN, KILLED = "first", "again", "killed"


@dataclass
class RepeatedRuns:
    """The three runs; `train` makes them.

    Attributes:
        folder: of all three.
        cache_dir: the built-in text and tokenizer; each run takes a copy.
        words: settings of the run.
        killed_at: last step that was recorded, and newest checkpoint, when SIGKILL came.
    """

    folder: Path
    cache_dir: Path
    words: Sequence[str]
    killed_at: tuple[int, int] = (0, 0)

    def train(self) -> None:
        """All three at the same time, and the killed one to its end.

        Raises:
            AssertionError: one fails, or takes too long.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (FIRST, AGAIN, KILLED):
            shutil.copytree(self.cache_dir, self._cache(name))
        with (
            self._started(FIRST) as first,
            self._started(AGAIN, "checkpoint.asynchronous=false") as again,
        ):
            self._kill()
            with self._started(KILLED) as resumed:
                for name, process in ((FIRST, first), (AGAIN, again), (KILLED, resumed)):
                    code = process.wait(LIMIT_SECONDS)
                    assert code == 0, f"{name} ended with {code}:\n{self.log(name)}"

    def log(self, name: str) -> str:
        """What a run said."""
        return self._log(name).read_text(errors="replace")

    def steps(self, name: str) -> list[int]:
        """Of its checkpoints."""
        return whole_steps(self.folder / name / "checkpoints")

    def records(self, name: str) -> list[dict[str, Any]]:
        """Of its metrics.jsonl."""
        return list(read_records(self.folder / name / "metrics.jsonl"))

    def differences(self, name: str, other: str = FIRST) -> list[str]:
        """Of records, and of tensors of the first checkpoint of two runs that is unlike."""
        found = list(different_records(self.records(name), self.records(other)))
        if self.steps(name) != self.steps(other):
            found.append(f"checkpoints: {self.steps(name)} instead of {self.steps(other)}")
            return found
        for step in self.steps(name):
            ours, theirs = (
                saved_tensors(whole_path(self.folder / run / "checkpoints", step))
                for run in (name, other)
            )
            unlike = [f"step {step}: {each}" for each in different_tensors(ours, theirs)]
            if unlike:
                return found + unlike
        return found

    def _kill(self) -> None:
        """Start the run and SIGKILL it between two checkpoints."""
        end = time.monotonic() + LIMIT_SECONDS
        with self._started(KILLED) as process:
            while self._last_step(KILLED) < KILL_STEP:
                assert process.poll() is None, f"it ended by itself:\n{self.log(KILLED)}"
                assert time.monotonic() < end, f"no step {KILL_STEP}:\n{self.log(KILLED)}"
                time.sleep(_POLL_SECONDS)
            time.sleep(random.uniform(0.0, KILL_DELAY))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        self.killed_at = (self._last_step(KILLED), max(self.steps(KILLED), default=0))

    def _last_step(self, name: str) -> int:
        records = self.records(name)
        return int(records[-1]["step"]) if records else 0

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _cache(self, name: str) -> Path:
        return self.folder / f"data_of_{name}"

    @contextlib.contextmanager
    def _started(self, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """The main job in a process of its own; it is killed at the end if it is still there."""
        arguments = [
            *("--config-dir", str(CONFIG_DIR), "experiment=small"),
            *(
                f"output_dir={self.folder}",
                f"run_name={name}",
                f"data.cache_dir={self._cache(name)}",
            ),
            *(f"schedule.steps={STEPS}", f"checkpoint.save_interval={SAVE_INTERVAL}"),
            *("checkpoint.keep_last=100", "checkpoint.asynchronous=true", *self.words, *words),
        ]
        python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_kanana.train", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
