"""How much may still be written, and errors of the disk in words."""

from __future__ import annotations

import os
from pathlib import Path


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written where `path` is or would be; None if nobody can tell."""
    for place in (path, *path.absolute().parents):
        try:
            status = os.statvfs(place)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return None


def describe(error: OSError) -> str:
    """One line: the path, what is wrong, and the space that is left there."""
    if error.filename is None:
        return error.strerror or str(error)
    free = free_bytes(Path(error.filename))
    left = "" if free is None else f" ({readable(free)} free)"
    return f"{error.filename}: {error.strerror}{left}"


def readable(num_bytes: int) -> str:
    """Bytes in a unit of which there are few: `1.5 GB`."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
