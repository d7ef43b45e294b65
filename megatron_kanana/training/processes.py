"""A process by its machine, number and start, so that no other is taken for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

_STATES = {
    "T": "it is stopped (SIGSTOP, or a debugger)",
    "t": "it is stopped (by a debugger)",
    "D": "it waits for a disk or a device (state D)",
    "Z": "it has ended",
}


@dataclass(frozen=True)
class Place:
    """A process.

    Attributes:
        host: name of its machine.
        pid: its number there.
        started: when, in the kernel's ticks; 0 where that is not known.
    """

    host: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def this_place() -> Place:
    """This process."""
    pid = os.getpid()
    status = _status(pid)
    return Place(socket.gethostname(), pid, int(status[19]) if status else 0)


def state_of(place: Place) -> str:
    """What the kernel says of a process of this machine, in words."""
    if not _is_there(place):
        return "its process is gone"
    return _STATES.get(_status(place.pid)[0], "its process runs, but its threads do not come to it")


def kill(place: Place) -> None:
    """End a process if it is one of this machine and still the same."""
    if place.host == socket.gethostname() and _is_there(place):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(place.pid, signal.SIGKILL)


def _is_there(place: Place) -> bool:
    status = _status(place.pid)
    return bool(status) and int(status[19]) == place.started


def _status(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none for a process that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
