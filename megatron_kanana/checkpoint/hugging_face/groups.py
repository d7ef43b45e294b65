"""Dealing tensors to files of bounded size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Sized(Protocol):
    """Anything that takes room in a file."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""


T = TypeVar("T", bound=Sized)


def group_by_size(items: Iterable[T], max_bytes: int) -> list[list[T]]:
    """Deal items to groups, in order; a group is larger than `max_bytes` only with one item."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        if not groups or item.num_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(item)
        room -= item.num_bytes
    return groups
