"""No process outlives the one that started it.

A process that writes a checkpoint in the background and outlives a killed run would go on writing
into the folder that the restarted run writes to; processes that outlive a killed torchrun would
train beside the ones that take their place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


@functools.cache
def end_children_with_me() -> None:
    """Have every process that this one forks from now on killed with it (Linux)."""
    parent = [os.getpid()]

    def in_child() -> None:
        end_with_parent(parent[0])
        parent[0] = os.getpid()

    os.register_at_fork(after_in_child=in_child)


def end_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends (Linux; elsewhere nothing is done).

    Args:
        parent: process number of the parent, to end now where it is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
