"""Python's garbage collector, kept out of what makes many objects that stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def garbage_collection_off(*, lasting: bool = False) -> Iterator[None]:
    """Nothing is looked for meanwhile; afterwards again, if it was before.

    The collector looks through all objects again whenever there are a quarter more of them: a third
    of the time in which the main job starts, and most of that in which a description of a
    checkpoint is read.

    Args:
        lasting: what there is afterwards stays, and is not looked through any more.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if lasting:
            gc.freeze()
        if was_on:
            gc.enable()
