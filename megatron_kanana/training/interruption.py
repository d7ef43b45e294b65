"""A signal asks the run to save and leave; all processes do so after the same step."""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_kanana.config.exit_status import SAVED_FOR_ANOTHER_START, SAVED_FOR_GOOD

logger = logging.getLogger(__name__)

EXIT_STATUS = {signal.SIGUSR1: SAVED_FOR_ANOTHER_START, signal.SIGTERM: SAVED_FOR_GOOD}


class Interruption:
    """Notes SIGUSR1 and SIGTERM from the beginning of a `with` block to its end.

    Args:
        device: where the processes' notes are brought together.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noted = 0
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = max(self._noted, number)

    def agreed(self) -> bool:
        """Whether any process has been signalled; every process must ask after each step.

        A signal reaches the processes at different moments, during different steps. The largest
        note of all of them is the same everywhere.
        """
        note = torch.tensor(self._noted, device=self._device)
        dist.all_reduce(note, dist.ReduceOp.MAX)
        self._agreed = int(note)
        if self._agreed:
            name = signal.Signals(self._agreed).name
            logger.info("%s: saving, then leaving before the end", name)
        return bool(self._agreed)

    @property
    def exit_status(self) -> int:
        """Status to leave with: 0 without a signal."""
        return EXIT_STATUS[signal.Signals(self._agreed)] if self._agreed else 0
