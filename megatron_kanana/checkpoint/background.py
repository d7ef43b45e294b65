"""Work in a process of its own, whose end is noticed however it comes.

megatron-core's own background writers wait for ever for one of their processes that was killed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_kanana.device.orphans import end_with_parent

from .free_space import describe

STOP_SECONDS = 5.0
"""How long a process that was killed may take to end; one that waits for a dead disk cannot."""


@dataclass(frozen=True)
class Outcome:
    """What came of the work: its result, or one line about the failure."""

    result: Any = None
    error: str | None = None


class Work:
    """One call of a function, by a forked process or at once.

    Args:
        function: what to do. A forked process sees this one's memory as it is now.
        background: whether to do it in a process of its own, while this one goes on.
        time_limit: seconds after which work in the background counts as failed.
    """

    def __init__(
        self, function: Callable[[], Any], *, background: bool, time_limit: float | None = None
    ) -> None:
        self._time_limit = time_limit
        self._started = time.monotonic()
        self._outcome: Outcome | None = None
        self._process: Any = None
        # Page-locked memory, in which copies from a GPU lie, is no copy in a forked process: what
        # the function reads must not be given back, and used anew, before it has ended.
        self._function: Callable[[], Any] | None = function
        if not background:
            self._outcome = _attempt(function)
            self._function = None
            return
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_report, args=(function, sender, os.getpid()), daemon=True
        )
        try:
            self._process.start()
        except OSError as error:
            self._process = None
            self._outcome = Outcome(error=f"no process can be started ({error.strerror})")
        sender.close()

    def outcome(self) -> Outcome | None:
        """What came of it; None while it goes on."""
        if self._outcome is None:
            self._outcome = self._look()
        if self._outcome is not None:
            self._function = None
        return self._outcome

    def _look(self) -> Outcome | None:
        alive = self._process.is_alive()  # asked first: it may report and end in between
        if self._receiver.poll():
            try:
                outcome = self._receiver.recv()
            except (EOFError, OSError):
                outcome = None
            self._process.join(STOP_SECONDS)
            return outcome or Outcome(error=_ending(self._process.exitcode))
        if not alive:
            return Outcome(error=_ending(self._process.exitcode))
        if self._time_limit is not None and time.monotonic() - self._started > self._time_limit:
            self.stop()
            return Outcome(
                error=f"not written within checkpoint.save_time_limit, {self._time_limit / 60:g}"
                " minutes: the storage is slow, or does not answer"
            )
        return None

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_SECONDS)


def _report(function: Callable[[], Any], sender: Connection, parent: int) -> None:
    """In the forked process: do the work and report."""
    end_with_parent(parent)
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # its rank answers them
        signal.signal(each, signal.SIG_IGN)
    # A forked process must not finalise what belongs to the other, such as CUDA tensors.
    gc.disable()
    sender.send(_attempt(function))
    sender.close()


def _attempt(function: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(function())
    except OSError as error:
        return Outcome(error=describe(error))
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        reason = ", most often for lack of memory" if name == "SIGKILL" else ""
        return f"the process that wrote was ended by {name}{reason}"
    return f"the process that wrote ended with status {exitcode} and without a word"
