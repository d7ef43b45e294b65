"""Checkpoint folders: when one becomes whole, which may go, and which are put aside.

A checkpoint is written under `step_00000100.partial` and renamed to `step_00000100` once every
rank has written its part and the manifest is on disk, so a name without `.partial` was a whole
checkpoint when it was given.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_kanana.config.manifest import sync
from megatron_kanana.config.saved import whole_path, whole_steps

ABANDONED = "abandoned"
"""What follows the name of a checkpoint that the run has gone back behind, after a dot."""


def partial_path(directory: Path, step: int) -> Path:
    """Folder where that checkpoint is being written."""
    return directory / f"step_{step:08d}.partial"


def publish(directory: Path, step: int) -> None:
    """Give a finished checkpoint its name, for good."""
    partial_path(directory, step).rename(whole_path(directory, step))
    sync(directory)


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


def discard_partial(directory: Path) -> None:
    """Delete what interrupted saves and deletions have left, as far as that can be."""
    for partial in directory.glob("step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint so that it is not used, and its step can be saved again.

    Args:
        checkpoint: its folder.
        why: one word, which follows the name.

    Returns:
        its new folder.

    Raises:
        OSError: it cannot be renamed.
    """
    target = checkpoint.with_name(f"{checkpoint.name}.{why}")
    number = 2
    while target.exists():
        target = checkpoint.with_name(f"{checkpoint.name}.{why}.{number}")
        number += 1
    return checkpoint.rename(target)
