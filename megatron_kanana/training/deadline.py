"""When a run must save and leave, so that it is done before it is ended."""

from __future__ import annotations

import os
import time

from megatron_kanana.config.check_watchdog import seconds_of
from megatron_kanana.config.exit_status import END_TIME, LAUNCH_TIME

UNKNOWN_SAVE_SECONDS = 60.0
"""Kept free for a checkpoint before one has been measured."""

MARGIN_SECONDS = 10.0


class Deadline:
    """Knows the end of the run's time, and how long before it the run must begin to save.

    Args:
        time_limit: `watchdog.time_limit`, counted from the launch, or from now without one.
    """

    def __init__(self, time_limit: str | None) -> None:
        ends = []
        if END_TIME in os.environ:
            ends.append(float(os.environ[END_TIME]))
        seconds = None if time_limit is None else seconds_of(time_limit)
        if seconds is not None:
            ends.append(float(os.environ.get(LAUNCH_TIME, time.time())) + seconds)
        self._end = min(ends, default=None)
        self._longest_step = 0.0
        self._last_look = time.monotonic()

    def has_come(self, save_seconds: float | None) -> bool:
        """Whether the run must save and leave now; to be asked after each step.

        Args:
            save_seconds: longest time that a checkpoint took so far; None before the first one.
        """
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last_look)
        self._last_look = now
        return self._end is not None and time.time() + self._reserve(save_seconds) >= self._end

    def _reserve(self, save_seconds: float | None) -> float:
        """Seconds that a step, a save and some delay take."""
        save = UNKNOWN_SAVE_SECONDS if save_seconds is None else save_seconds
        return 1.5 * (self._longest_step + save) + MARGIN_SECONDS
