"""Times of the watchdog that contradict one another."""

from __future__ import annotations

from collections.abc import Iterator

from .check_cluster import time_limit_seconds
from .environment import Environment
from .problems import Problem
from .schema import Settings


def check_watchdog(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Limits are in order, and the time limit is a time."""
    watchdog = settings.watchdog
    if watchdog.long_timeout < watchdog.timeout:
        yield Problem(
            "watchdog.long_timeout",
            watchdog.long_timeout,
            f"is shorter than watchdog.timeout = {watchdog.timeout}",
            f"choose at least {watchdog.timeout}",
        )
    if watchdog.time_limit is not None and seconds_of(watchdog.time_limit) is None:
        yield Problem(
            "watchdog.time_limit",
            watchdog.time_limit,
            "is no time",
            "write [days-]hours:minutes:seconds, such as '47:30:00', or seconds, such as '3600'",
        )


def seconds_of(time_limit: str) -> int | None:
    """Seconds of [days-]hours:minutes:seconds or of a number; None for other text."""
    return int(time_limit) if time_limit.isdecimal() else time_limit_seconds(time_limit)
