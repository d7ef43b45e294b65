"""Loading a checkpoint through megatron-core, with one clear error if it holds code."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kanana.device.safe_unpickling import UnsafeFileError

COMMON_FILE = "common.pt"


def load_common(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors and the processes' own objects.

    Raises:
        UnsafeFileError: it names code.
    """
    with _refusals(path / COMMON_FILE):
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(path))
    return common


def load_sharded(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """megatron-core's `dist_checkpointing.load`; every process must call this.

    Raises:
        UnsafeFileError: a file of the checkpoint names code.
    """
    with _refusals(path):
        state: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    return state


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Errors over code, which torch wraps or words for programmers, as `UnsafeFileError`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _worded(error, path) from None
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, (UnsafeFileError, pickle.UnpicklingError)):
                raise _worded(failure, path) from None
        raise


def _worded(error: BaseException, path: Path) -> UnsafeFileError:
    if isinstance(error, UnsafeFileError):
        return error
    named = str(error).split("GLOBAL ")[1:]
    what = (
        f"names {named[0].split()[0]}, which is no part of a checkpoint" if named else "is damaged"
    )
    return UnsafeFileError(
        f"{path} {what}: nothing of it was run. Load checkpoints that this project has written"
    )
