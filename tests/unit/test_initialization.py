"""Initial weights depend on seed and name; every rank cuts its part from the same tensor."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.model.initialization import initialize_weights

MODEL = load_settings([], Environment()).model


def filled(key: str, shape: tuple[int, int], parts: int, axis: int, seed: int) -> torch.Tensor:
    """A weight put together from `parts` ranks that each initialise their own part."""
    local = list(shape)
    local[axis] //= parts
    pieces = []
    for rank in range(parts):
        piece = torch.zeros(local)
        shard = ShardedTensor.from_rank_offsets(key, piece, (axis, rank, parts))
        initialize_weights({key: shard}, MODEL, seed)
        pieces.append(piece)
    return torch.cat(pieces, dim=axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_are_those_of_the_whole(axis: int, parts: int) -> None:
    whole = filled("decoder.weight", (64, 96), 1, 0, seed=7)
    assert torch.equal(filled("decoder.weight", (64, 96), parts, axis, seed=7), whole)


def test_other_names_and_seeds_give_other_weights() -> None:
    first = filled("a.weight", (64, 96), 1, 0, seed=7)
    for other in (
        filled("b.weight", (64, 96), 1, 0, seed=7),
        filled("a.weight", (64, 96), 1, 0, 8),
    ):
        correlation = (first * other).mean() / (first.std() * other.std())
        assert abs(float(correlation)) < 5 / math.sqrt(64 * 96)


@pytest.mark.parametrize(
    ("key", "factor"),
    [("linear_fc1.weight", 1.0), ("linear_fc2.weight", 8**-0.5), ("linear_proj.weight", 8**-0.5)],
)
def test_spread_is_smaller_where_a_layer_writes_to_the_residual(key: str, factor: float) -> None:
    weight = filled(key, (512, 512), 1, 0, seed=1)
    assert float(weight.std()) == pytest.approx(MODEL.init_std * factor, rel=0.01)
    assert abs(float(weight.mean())) < 5 * MODEL.init_std / 512


def test_vectors_keep_their_constants() -> None:
    gain = torch.ones(16)
    shard = ShardedTensor.from_rank_offsets("norm.weight", gain)
    initialize_weights({"norm.weight": shard}, MODEL, 1)
    assert torch.equal(gain, torch.ones(16))
