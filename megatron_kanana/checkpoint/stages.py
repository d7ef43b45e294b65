"""Work of all ranks in stages: each begins once every rank has finished the one before.

Every rank looks at its own process and all learn of a failure in the same look, so that none waits
for one that failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .background import Work

POLL_SECONDS = 0.05

Start = Callable[[Callable[[], Any]], Work]
"""Begins work, in the background or at once."""

NextStage = Callable[[Any], "Callable[[], Any] | None"]
"""From a rank's result of the stage before to what it does in the next one, if anything. It is
called on every rank at the same time and may use collectives."""


class Stages:
    """What is under way on all ranks.

    Attributes:
        errors: of all ranks, once the work is over; none if all went well.

    Args:
        device: where the ranks' states are brought together.
        start: begins work.
        first: the first stage of this rank.
        rest: the others.
    """

    def __init__(
        self,
        device: torch.device,
        start: Start,
        first: Callable[[], Any],
        rest: Sequence[NextStage],
    ) -> None:
        self.errors: list[str] = []
        self._device = device
        self._start = start
        self._rest = list(rest)
        self._work: Work | None = start(first)

    def advance(self) -> bool:
        """Whether all is over; every rank must call this at the same time."""
        outcome = self._work.outcome() if self._work is not None else None
        working = self._work is not None and outcome is None
        error = outcome.error if outcome is not None else None
        anyone_working, failed = agree(self._device, int(working), int(error is not None))
        if failed:
            self.stop()
            self.errors = gathered_errors(error)
            return True
        if anyone_working:
            return False
        if not self._rest:
            return True
        following = self._rest.pop(0)(outcome.result if outcome is not None else None)
        self._work = self._start(following) if following is not None else None
        return False

    def finish(self) -> None:
        """Wait until all is over, without any rank waiting long in a collective."""
        while not self.advance():
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the work of this rank."""
        if self._work is not None:
            self._work.stop()


def agree(device: torch.device, *values: int) -> list[int]:
    """The sum of each value over all ranks; every rank must call this."""
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(value) for value in total]


def gathered_errors(error: str | None) -> list[str]:
    """The errors of all ranks, each with its rank; every rank must call this."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]
