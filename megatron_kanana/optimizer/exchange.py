"""Whole tensors from the pieces that processes hold, on one owner each, and back: all-to-all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from .flat_shards import Piece

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Item:
    """One flat tensor to be brought together, or dealt out.

    Attributes:
        owner: rank of the process that has it whole.
        pieces: who holds what of it, in order of elements; at most one piece a process.
    """

    owner: int
    pieces: tuple[Piece, ...]


class Pending(Generic[T]):
    """A collective under way; `wait` gives its result."""

    def __init__(self, work: dist.Work | None, finish: Callable[[], T]) -> None:
        self._work = work
        self._finish = finish

    def wait(self) -> T:
        """The result, once the collective has filled it (on CUDA: in the order of the stream)."""
        if self._work is not None:
            self._work.wait()
        return self._finish()


def gather(
    items: Mapping[Key, Item],
    local: Mapping[Key, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> Pending[dict[Key, torch.Tensor]]:
    """Bring each item together on its owner; every process of the group must call this.

    Args:
        items: the same on every process, in the same order.
        local: this process's piece of each item, flat; cast to `dtype` on the way.

    Returns:
        the whole flat tensors of the items this process owns.
    """
    if group.size() == 1:
        whole = {key: local[key].to(dtype) for key in items}
        return Pending(None, lambda: whole)
    rank = group.rank()
    to_send = [
        (item.owner, local[key])
        for key, item in items.items()
        if any(piece.rank == rank for piece in item.pieces)
    ]
    owned = {key: item for key, item in items.items() if item.owner == rank}
    sizes = [0] * group.size()
    for item in owned.values():
        for piece in item.pieces:
            sizes[piece.rank] += piece.end - piece.start
    work, received = _all_to_all(to_send, sizes, dtype, device, group)

    def finish() -> dict[Key, torch.Tensor]:
        taken = [0] * group.size()
        whole = {}
        for key, item in owned.items():
            parts = [_take(received[piece.rank], taken, piece) for piece in item.pieces]
            whole[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole

    return Pending(work, finish)


def scatter(
    items: Mapping[Key, Item],
    whole: Mapping[Key, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> Pending[dict[Key, torch.Tensor]]:
    """Deal each item out from its owner; every process of the group must call this.

    Args:
        items: the same on every process, in the same order.
        whole: the items this process owns, flat; cast to `dtype` on the way.

    Returns:
        this process's pieces, flat.
    """
    if group.size() == 1:
        pieces = {key: whole[key].to(dtype) for key in items}
        return Pending(None, lambda: pieces)
    rank = group.rank()
    to_send = [
        (piece.rank, whole[key][piece.start : piece.end])
        for key, item in items.items()
        if item.owner == rank
        for piece in item.pieces
    ]
    mine = [
        (key, item.owner, piece)
        for key, item in items.items()
        for piece in item.pieces
        if piece.rank == rank
    ]
    sizes = [0] * group.size()
    for _, owner, piece in mine:
        sizes[owner] += piece.end - piece.start
    work, received = _all_to_all(to_send, sizes, dtype, device, group)

    def finish() -> dict[Key, torch.Tensor]:
        taken = [0] * group.size()
        return {
            key: _take(received[owner], taken, Piece(owner, piece.start, piece.end))
            for key, owner, piece in mine
        }

    return Pending(work, finish)


def _all_to_all(
    to_send: Sequence[tuple[int, torch.Tensor]],
    receive_sizes: list[int],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> tuple[dist.Work | None, tuple[torch.Tensor, ...]]:
    """Send tensors to ranks; what will come from each rank, in the order it was sent."""
    send_sizes = [0] * group.size()
    by_rank: list[list[torch.Tensor]] = [[] for _ in send_sizes]
    for rank, tensor in to_send:
        send_sizes[rank] += tensor.numel()
        by_rank[rank].append(tensor)
    sent = torch.empty(sum(send_sizes), dtype=dtype, device=device)
    start = 0
    for tensors in by_rank:
        for tensor in tensors:
            sent[start : start + tensor.numel()].copy_(tensor)
            start += tensor.numel()
    received = torch.empty(sum(receive_sizes), dtype=dtype, device=device)
    work = dist.all_to_all_single(
        received, sent, receive_sizes, send_sizes, group=group, async_op=True
    )
    return work, received.split(receive_sizes)


def _take(received: torch.Tensor, taken: list[int], piece: Piece) -> torch.Tensor:
    """The next piece of what came from `piece.rank`; `taken` counts what is used up."""
    start = taken[piece.rank]
    taken[piece.rank] = start + piece.end - piece.start
    return received[start : taken[piece.rank]]
