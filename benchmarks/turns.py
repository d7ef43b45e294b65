"""Runs of several contenders in turn, while there is time, and the reason for each not run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .card import reason

Curves = dict[str, list[list[float]]]
"""By contender, the loss of each step of each of its whole runs."""


class OutOfTimeError(Exception):
    """A run was ended before its last step."""


class Clock:
    """What is left of a time limit.

    Attributes:
        limited: whether there is one.

    Args:
        limit: seconds from now; None for no limit.
        now: seconds since some time.
    """

    def __init__(self, limit: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.limited = limit is not None
        self._now = now
        self._end = None if limit is None else now() + limit

    def seconds(self) -> float:
        """Of now, for differences."""
        return self._now()

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self._end is None else self._end - self._now()

    def check(self, done: str) -> None:
        """End a run that is out of time.

        Raises:
            OutOfTimeError: nothing is left; tells `done`.
        """
        if self.left() <= 0:
            raise OutOfTimeError(done)


def in_turn(
    names: Sequence[str],
    count: int,
    train: Callable[[str, int], list[float]],
    clock: Clock,
    after_each: Callable[[Curves, list[str]], None],
) -> None:
    """Give every contender a run before any has two.

    A run that takes longer than what is left, by the contender's run before, is not begun. One that
    is out of time or fails is not counted; a contender that fails has no more.

    Args:
        train: the curve of a contender's run of a number; may raise OutOfTimeError.
        after_each: is told all curves until then, and what was not run; at the end once more.
    """
    curves: Curves = {name: [] for name in names}
    notes: list[str] = []
    took: dict[str, float] = {}
    failed: set[str] = set()
    for number in range(count):
        for name in names:
            if name in failed:
                continue
            called = f"not run: {name}, run {number + 1} of {count}"
            left = max(0.0, clock.left())
            if left <= took.get(name, 0.0):
                would = f"it would take {took[name]:.0f} s, " if name in took else ""
                notes.append(f"{called}: {would}{left:.0f} s are left")
                print(notes[-1], flush=True)
                continue
            start = clock.seconds()
            try:
                curves[name].append(train(name, number))
            except OutOfTimeError as error:
                notes.append(f"{called}, to its end: out of time, {error}")
                print(notes[-1], flush=True)
            except Exception as error:  # whatever a peer raises, the others run
                failed.add(name)
                notes.append(f"{called} and later: {reason(error)}")
                print(notes[-1], flush=True)
            took[name] = clock.seconds() - start
            print(f"{name}, run {number + 1} of {count}: {took[name]:.0f} s", flush=True)
            after_each(curves, notes)
    after_each(curves, notes)
