"""Where the pieces of a parameter lie in megatron-core's distributed optimizer.

It lays all parameters of one kind (dense or expert) one after another in a flat buffer, cuts the
buffer's buckets into equal parts and gives each data-parallel process one part of each bucket:
its gradients, its fp32 weights, its optimizer state. So a process holds one contiguous piece of a
parameter, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .logical_matrices import plain_name


@dataclass(frozen=True)
class Piece:
    """A range of a flattened parameter, and the process that holds it.

    Attributes:
        rank: the process's rank in the group at hand.
        start, end: range of the elements.
    """

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class FlatParameter:
    """One parameter of this process's model, or one matrix of a parameter that is a stack of them.

    Attributes:
        chunk: number of its model chunk on this process.
        name: the parameter's plain name in the chunk.
        parameter: the model's weight; with tensor parallelism its local shard.
        pieces: who holds what of it, by rank in the data-parallel group, in order of elements.
        piece: this process's, or None.
        main: fp32 weights, flat, which the optimizer updates, of this process's piece of the
            parameter; `local` finds `piece` in it. None without a piece.
        group: the parameter group of `main` (learning rate, weight decay); or None.
        matrix: number of the matrix in the parameter; None for the whole of it.
        offset: where in `main` the elements of `piece` begin.
    """

    chunk: int
    name: str
    parameter: torch.nn.Parameter
    pieces: tuple[Piece, ...]
    piece: Piece | None
    main: torch.Tensor | None
    group: dict[str, Any] | None
    matrix: int | None = None
    offset: int = 0

    @property
    def shape(self) -> torch.Size:
        """Of the parameter, or of the matrix."""
        return self.parameter.shape if self.matrix is None else self.parameter.shape[1:]

    def local(self, like_main: torch.Tensor) -> torch.Tensor:
        """What belongs to `piece` in a tensor of the form of `main`; a view."""
        assert self.piece is not None
        return like_main.narrow(0, self.offset, self.piece.end - self.piece.start)


def members(optimizer: Any) -> list[Any]:
    """megatron-core's distributed optimizers in a chain: of dense, and of expert parameters."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in chained if not member.is_stub_optimizer]


def flat_parameters(member: Any) -> list[FlatParameter]:
    """All parameters of a distributed optimizer, in the same order on each of its processes.

    Those of three dimensions are stacks; each of their matrices comes by itself.
    """
    names = {
        parameter: (index, plain_name(name))
        for index, chunk in enumerate(member.model_chunks)
        for name, parameter in chunk.named_parameters()
    }
    mains = _mains(member)
    rank = member.data_parallel_group.rank()
    result: list[FlatParameter] = []
    for buffer in member.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            pieces = tuple(
                _pieces(start, end, buffer.buckets[bucket], buffer.data_parallel_world_size)
            )
            piece = next((piece for piece in pieces if piece.rank == rank), None)
            main, group = mains.get(parameter, (None, None))
            assert (main is None) == (piece is None)
            assert main is None or piece is None or main.numel() == piece.end - piece.start
            whole = FlatParameter(*names[parameter], parameter, pieces, piece, main, group)
            result += _matrices(whole) if parameter.dim() == 3 else [whole]
    return sorted(result, key=lambda flat: (flat.chunk, flat.name, flat.matrix or 0))


def _matrices(stack: FlatParameter) -> Iterator[FlatParameter]:
    """The matrices of a stack, each with its part of the stack's pieces."""
    size = stack.parameter[0].numel()
    for number in range(len(stack.parameter)):
        start = number * size
        pieces = tuple(
            Piece(piece.rank, max(piece.start, start) - start, min(piece.end, start + size) - start)
            for piece in stack.pieces
            if piece.start < start + size and piece.end > start
        )
        rank = None if stack.piece is None else stack.piece.rank
        piece = next((piece for piece in pieces if piece.rank == rank), None)
        if stack.piece is None or piece is None:
            yield replace(stack, pieces=pieces, piece=None, main=None, group=None, matrix=number)
        else:
            offset = start + piece.start - stack.piece.start
            yield replace(stack, pieces=pieces, piece=piece, matrix=number, offset=offset)


def _pieces(start: int, end: int, bucket: Any, num_processes: int) -> Iterator[Piece]:
    """Pieces of the parameter that lies from `start` to `end` in the buffer of `bucket`."""
    part = bucket.grad_data.numel() // num_processes
    for rank in range(num_processes):
        part_start = bucket.offset + rank * part
        piece_start, piece_end = max(start, part_start), min(end, part_start + part)
        if piece_start < piece_end:
            yield Piece(rank, piece_start - start, piece_end - start)


def _mains(member: Any) -> dict[torch.nn.Parameter, tuple[torch.Tensor, dict[str, Any]]]:
    """fp32 piece and parameter group of each parameter of which this process holds a piece."""
    pairs = (
        (member.model_fp32_groups, member.shard_fp32_groups),
        (member.model_float16_groups, member.shard_fp32_from_float16_groups),
    )
    return {
        parameter: (main, group)
        for parameter_groups, main_groups in pairs
        for parameters, mains, group in zip(
            parameter_groups, main_groups, member.optimizer.param_groups, strict=True
        )
        for parameter, main in zip(parameters, mains, strict=True)
    }
