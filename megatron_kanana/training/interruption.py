"""A signal asks the run to save and leave; all processes do so after the same step."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_kanana.config.exit_status import SAVED_FOR_ANOTHER_START, SAVED_FOR_GOOD

from .deadline import Deadline

logger = logging.getLogger(__name__)

EXIT_STATUS = {signal.SIGUSR1: SAVED_FOR_ANOTHER_START, signal.SIGTERM: SAVED_FOR_GOOD}


class Interruption:
    """Notes SIGUSR1 and SIGTERM from the beginning of a `with` block to its end.

    Until `listen` there is nothing to save, and a signal ends the process at once.

    Args:
        time_limit: `watchdog.time_limit`; its approach counts as SIGUSR1.
    """

    def __init__(self, time_limit: str | None = None) -> None:
        self._time_limit = time_limit
        self._deadline: Deadline | None = None
        self._device: torch.device | None = None
        self._noted = 0
        self._noted_at = 0.0
        self._before: dict[signal.Signals, object] = {}
        self._agreed = 0

    def __enter__(self) -> Interruption:
        for each in EXIT_STATUS:
            self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    def listen(self, device: torch.device) -> None:
        """Training begins; `agreed` is asked after each step from now on.

        Args:
            device: where the processes' notes are brought together.
        """
        self._device = device
        self._deadline = Deadline(self._time_limit)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._device is None:
            name = signal.Signals(number).name
            print(f"{name} during start-up: leaving at once", file=sys.stderr, flush=True)
            os._exit(EXIT_STATUS[signal.Signals(number)])
        if not self._noted:
            self._noted_at = time.monotonic()
        self._noted = max(self._noted, number)

    def agreed(self, save_seconds: float | None = None) -> bool:
        """Whether any process has been signalled, or the time is nearly over.

        Every process must ask after each step. A signal reaches the processes at different moments,
        during different steps. The largest note of all of them is the same everywhere.

        Args:
            save_seconds: longest time that a checkpoint took so far; None before the first one.
        """
        assert self._device is not None and self._deadline is not None
        near = self._deadline.has_come(save_seconds)
        noted = self._noted or (signal.SIGUSR1 if near else 0)
        note = torch.tensor(noted, device=self._device)
        dist.all_reduce(note, dist.ReduceOp.MAX)
        self._agreed = int(note)
        if self._agreed:
            name = signal.Signals(self._agreed).name
            why = "the time limit is near" if near and not self._noted else name
            logger.info("%s: saving, then leaving before the end", why)
        return bool(self._agreed)

    def saved(self) -> None:
        """All is saved: tell how long that took since the signal."""
        if self._noted:
            seconds = time.monotonic() - self._noted_at
            logger.info("saved %.1f s after the signal", seconds)

    @property
    def exit_status(self) -> int:
        """Status to leave with: 0 without a signal."""
        return EXIT_STATUS[signal.Signals(self._agreed)] if self._agreed else 0
