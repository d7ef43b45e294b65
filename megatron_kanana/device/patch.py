"""What a change to another package is described by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One change, by name, with the reason it exists and the function that makes it."""

    name: str
    reason: str
    apply: Callable[[], None]
