"""The optimizer's part of a checkpoint, in a form that no layout changes.

For each parameter its fp32 weight and its state, as tensors of the parameter's shape under the
keys that megatron-core's fully reshardable checkpoints have; and the number of updates. Learning
rates and other hyperparameters come from the settings of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_kanana.config import ConfigurationError
from megatron_kanana.config.problems import Problem
from megatron_kanana.model.matrix_stack import MatrixStack, Sharded, described_as
from megatron_kanana.optimizer.whole_state import (
    FP32_WEIGHT,
    Entry,
    gather_state,
    owned_entries,
    scatter_state,
)


def to_save(optimizer: Any, model: Mapping[str, Any]) -> dict[Entry, Sharded]:
    """What this process saves of the optimizer's state; every process must call this.

    Args:
        optimizer: megatron-core's optimizer.
        model: sharded state dicts of the model chunks, which name the parameters.
    """
    return describe(gather_state(optimizer), owned_entries(optimizer), model)


def to_load(optimizer: Any, model: Mapping[str, Any]) -> dict[Entry, Sharded]:
    """Places for what this process loads, on the CPU."""
    return places(owned_entries(optimizer), model)


def weights_to_load(
    optimizer: Any, model: Mapping[str, Any], path: Path
) -> dict[Entry, Sharded] | None:
    """Places for the fp32 weights that this process loads; None where a checkpoint has none."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    if not any(name.startswith(key(FP32_WEIGHT, "")) for name in stored):
        return None
    owned = owned_entries(optimizer)
    return places({entry: owned[entry] for entry in owned if entry.state == FP32_WEIGHT}, model)


def describe(
    tensors: Mapping[Entry, torch.Tensor],
    parameters: Mapping[Entry, torch.nn.Parameter],
    model: Mapping[str, Any],
) -> dict[Entry, Sharded]:
    """Whole tensors as the parts of a checkpoint that this process saves.

    Args:
        tensors: one a parameter, in its shape; of a stack of matrices, one a matrix.
        parameters: the parameter that each belongs to.
        model: sharded state dicts of the model chunks.
    """
    of_parameter = _by_parameter(model)
    return {
        entry: _sharded(entry, tensor, of_parameter[parameters[entry]])
        for entry, tensor in tensors.items()
    }


def places(
    parameters: Mapping[Entry, torch.nn.Parameter], model: Mapping[str, Any]
) -> dict[Entry, Sharded]:
    """Places on the CPU for such parts, to load into."""
    empty = {
        entry: torch.empty(parameter.shape[0 if entry.matrix is None else 1 :])
        for entry, parameter in parameters.items()
    }
    return describe(empty, parameters, model)


def check_stored(wanted: Mapping[Entry, Sharded], path: Path, name: str) -> None:
    """Make sure that a checkpoint holds the optimizer's state; every process must call this.

    Args:
        wanted: what this process wants of it.
        path: the checkpoint.
        name: `optimizer.name` of the run.

    Raises:
        ConfigurationError: it does not hold what some process wants; raised on every process.
    """
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    mine = {sharded.key for sharded in wanted.values() if sharded.key not in stored}
    of_processes: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_processes, mine)
    missing = sorted(set().union(*of_processes))
    if missing:
        reason = (
            f"the checkpoint {path} lacks {len(missing)} tensors of this optimizer, such as"
            f" {missing[0]}: it was made with another optimizer.name, muon_kinds or adamw_kinds"
        )
        remedy = (
            "take those of its settings.yaml, or give the run another run_name and begin with the"
            f" weights alone: checkpoint.load={path} checkpoint.load_what=weights"
        )
        raise ConfigurationError([Problem("optimizer.name", name, reason, remedy)])


def load(optimizer: Any, loaded: Mapping[Entry, torch.Tensor], steps: int) -> None:
    """Put loaded tensors and the number of updates back; every process must call this."""
    scatter_state(optimizer, loaded, steps)


def key(state: str, weight: str) -> str:
    """Name in a checkpoint of the state that belongs to the weight of that name."""
    return f"optimizer.state.{state}.{weight}"


def _by_parameter(model: Mapping[str, Any]) -> dict[torch.Tensor, Sharded]:
    return {
        sharded.data: sharded
        for chunk in model.values()
        for sharded in chunk.values()
        if isinstance(sharded, (ShardedTensor, ShardedTensorFactory))
    }


def _sharded(entry: Entry, tensor: torch.Tensor, weight: Sharded) -> Sharded:
    """`tensor` described as the part of a whole one that the model's weight is."""
    form = weight
    if entry.matrix is not None:
        assert isinstance(weight, MatrixStack)
        form = weight.matrices[entry.matrix]
    # Of the data-parallel processes only the owner describes it.
    replica_id = (*weight.replica_id[:2], 0)
    return described_as(form, tensor, key=key(entry.state, weight.key), replica_id=replica_id)
