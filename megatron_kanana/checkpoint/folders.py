"""Checkpoint folders: when one becomes whole, and which may go.

A checkpoint is written under `step_00000100.partial` and renamed to `step_00000100` once every
rank has written its part, so a name without `.partial` is a whole checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_kanana.config.saved import whole_path, whole_steps


def partial_path(directory: Path, step: int) -> Path:
    """Folder where that checkpoint is being written."""
    return directory / f"step_{step:08d}.partial"


def publish(directory: Path, step: int) -> None:
    """Give a finished checkpoint its name."""
    partial_path(directory, step).rename(whole_path(directory, step))


def discard_old(directory: Path, keep_last: int, keep_every: int) -> list[int]:
    """Delete whole checkpoints beyond the newest `keep_last`, sparing multiples of `keep_every`.

    Returns:
        the steps deleted.
    """
    old = [
        step
        for step in whole_steps(directory)[:-keep_last]
        if not (keep_every and step % keep_every == 0)
    ]
    for step in old:
        # Renamed first: an interruption must not leave half a checkpoint under a whole one's name.
        doomed = partial_path(directory, step)
        whole_path(directory, step).rename(doomed)
        shutil.rmtree(doomed)
    return old
