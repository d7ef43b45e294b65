"""The processes that together hold whole weights: over tensor and data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from .flat_shards import Piece


@dataclass(frozen=True)
class MatrixGroup:
    """Processes among which each weight lies whole, perhaps more than once.

    They are those of one pipeline stage; for experts, those of a stage that hold the same experts.

    Attributes:
        process_group: for collectives.
        num_shards: tensor-parallel shards of a split weight; copies of one that is not.
        shard: this process's shard.
        ranks: rank in `process_group` of each (shard, rank in the data-parallel group).
    """

    process_group: dist.ProcessGroup
    num_shards: int
    shard: int
    ranks: dict[tuple[int, int], int]

    def pieces(self, shard: int, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """Pieces of a shard, by data-parallel rank, with their ranks in this group instead."""
        return tuple(
            Piece(self.ranks[shard, piece.rank], piece.start, piece.end) for piece in pieces
        )


def dense_process_group() -> dist.ProcessGroup:
    """Processes of this pipeline stage."""
    group: dist.ProcessGroup = parallel_state.get_tensor_and_data_parallel_group(
        with_context_parallel=True
    )
    return group


def expert_process_group() -> dist.ProcessGroup:
    """Processes of this pipeline stage that hold the same experts; every process must call this."""
    group: dist.ProcessGroup = parallel_state.get_expert_data_parallel_group()
    if parallel_state.get_expert_tensor_parallel_world_size() == 1:
        return group
    where = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, where)
    together = [
        [rank for rank, other in enumerate(everywhere) if other == place]
        for place in sorted(set(everywhere))
    ]
    group, _ = dist.new_subgroups_by_enumeration(together)
    return group


def matrix_group(
    process_group: dist.ProcessGroup, num_shards: int, shard: int, data_parallel_rank: int
) -> MatrixGroup:
    """The group with everyone's place in it; every process of the group must call this."""
    places: list[Any] = [None] * process_group.size()
    dist.all_gather_object(places, (shard, data_parallel_rank), group=process_group)
    ranks = {place: rank for rank, place in enumerate(places)}
    return MatrixGroup(process_group, num_shards, shard, ranks)
