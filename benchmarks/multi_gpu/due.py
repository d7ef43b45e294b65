"""Comparisons that are made as soon as their runs have ended, while other runs go on."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .comparison import Verdict
from .jobs import DONE

Result = Verdict | str
"""Of a comparison; in words why there is none."""


@dataclass(frozen=True)
class Due:
    """A comparison, once its runs have ended.

    Attributes:
        title: of the runs.
        folders: of all runs that it reads; the last is the one that is compared.
        compare: returns the verdicts; may raise OSError or AssertionError.
    """

    title: str
    folders: Sequence[Path]
    compare: Callable[[], list[Verdict]]

    @property
    def is_ready(self) -> bool:
        """Whether all runs have ended."""
        return all((folder / DONE).exists() for folder in self.folders)

    def missing(self, failures: Mapping[Path, str]) -> str:
        """Why there are no verdicts."""
        if self.is_ready:
            return f"{self.title}: not compared: no time was left"
        for folder in reversed(self.folders):
            if folder in failures:
                whose = "" if folder == self.folders[-1] else f"{folder.name}: "
                return f"{self.title}: not run: {whose}{failures[folder]}"
        return f"{self.title}: not run: it or what it is compared with had not ended"


class Comparisons:
    """All comparisons, and what came of them.

    Args:
        due: in the order of the results.
    """

    def __init__(self, due: Sequence[Due]) -> None:
        self.due = due
        self.found: dict[str, list[Result]] = {}
        self.slowest = 0.0

    def look(self, end: float) -> list[Result]:
        """Compare what has ended since the last look; returns what is new.

        Args:
            end: of `time.monotonic`, by which it has looked: it begins no comparison that the
                slowest so far would take beyond.
        """
        new: list[Result] = []
        for due in self.due:
            began = time.monotonic()
            if began + self.slowest > end:
                break
            if due.title in self.found or not due.is_ready:
                continue
            try:
                with _alone():
                    found: list[Result] = [*due.compare()]
            except (OSError, AssertionError) as error:
                found = [f"{due.title}: not compared: {error}"]
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.found[due.title] = found
            new += found
        return new

    def results(self, failures: Mapping[Path, str]) -> list[Result]:
        """Of every comparison.

        Args:
            failures: why runs were not done, by their folder.
        """
        return [
            result
            for due in self.due
            for result in self.found.get(due.title, None) or [due.missing(failures)]
        ]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Beside the runs, many threads only wait for each other; and no process group is right."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        torch.set_num_threads(threads)
