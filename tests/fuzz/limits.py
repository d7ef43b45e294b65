"""A time limit around a piece of work, and what is left on the disk after it."""

from __future__ import annotations

import contextlib
import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class HungError(BaseException):
    """The work did not end. No Exception, so that no handler of errors takes it for one."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer.

    Raises:
        HungError: it did.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise HungError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by path; of what is no file, its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
        elif not path.is_dir():
            found[name] = "special"
    return found
