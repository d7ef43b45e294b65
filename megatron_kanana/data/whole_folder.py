"""Folders that runs share: made once, and there only when they are whole."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

LEFT_BEHIND_SECONDS = 7 * 24 * 3600
"""When what another machine has begun is taken for left behind; nothing takes as long to make."""


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which then becomes `folder`.

    Runs that begin together make the same folder at once. Each writes into one of its own, and
    `folder` is what the first to end has written; the others have made the same, for nothing.
    What interrupted runs have left is removed.
    """
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.partial.*"):
        if _is_left_behind(left):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial.{socket.gethostname()}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_left_behind(partial: Path) -> bool:
    host, _, process = partial.name.partition(".partial.")[2].rpartition(".")
    try:
        if host != socket.gethostname():
            return time.time() - partial.stat().st_mtime > LEFT_BEHIND_SECONDS
        os.kill(int(process), 0)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (PermissionError, ValueError):
        return False
    return int(process) == os.getpid()  # of an earlier process of this number
