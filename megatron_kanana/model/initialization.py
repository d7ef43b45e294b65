"""Initial weights that depend on the seed and the parameter's name, never on the layout.

Each parameter's whole tensor is drawn from a generator seeded with its checkpoint name; a rank
keeps its own part. So a run starts alike on one process and on a thousand.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_kanana.config.schema import (
    STANDARD_PARAMETRIZATION,
    ModelSettings,
    TransferSettings,
)
from megatron_kanana.optimizer.transfer import initial_std

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def initialize_weights(
    sharded_state_dict: dict[str, object],
    model: ModelSettings,
    seed: int,
    transfer: TransferSettings = STANDARD_PARAMETRIZATION,
) -> None:
    """Fill the matrices of a model chunk in place; norms and buffers keep their constants.

    Matrices are normal with `init_std`, or with what muP makes of it at this width; those that
    write to the residual stream with 1 / sqrt(2 * num_layers) of that (GPT-2, section 2.3).

    Args:
        sharded_state_dict: of the chunk; says where each local tensor lies in the whole one.
        model: gives the standard deviation and the depth.
        seed: `seed` of the settings.
        transfer: muP, or its absence.

    Raises:
        UnknownParameterError: with muP, for matrices the table of logical matrices lacks.
    """
    for entry in sharded_state_dict.values():
        for shard in shards(entry):
            if shard.data is not None and len(shard.local_shape) >= 2:
                _fill(shard, model, seed, transfer)


def shards(entry: object) -> list[ShardedTensor]:
    """The sharded tensors in one entry of a sharded state dict; none in anything else."""
    if isinstance(entry, ShardedTensorFactory):
        parts = entry.build()
        return list(parts.values()) if isinstance(parts, dict) else list(parts)
    return [entry] if isinstance(entry, ShardedTensor) else []


def _fill(
    shard: ShardedTensor, model: ModelSettings, seed: int, transfer: TransferSettings
) -> None:
    prepended = shard.prepend_axis_num
    index = shard.global_offset[:prepended]
    shape = shard.global_shape[prepended:]
    offset = shard.global_offset[prepended:]
    name = f"{shard.key}{list(index)}"
    std = initial_std(shard.key, model, transfer)
    if shard.key.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * model.num_layers)
    device = shard.data.device
    generator = torch.Generator(device=device).manual_seed(_seed(name, seed))
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    whole.normal_(0.0, std, generator=generator)
    local = tuple(
        slice(start, start + size) for start, size in zip(offset, shard.local_shape, strict=True)
    )
    with torch.no_grad():
        shard.data.copy_(whole[local].view_as(shard.data))


def _seed(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
