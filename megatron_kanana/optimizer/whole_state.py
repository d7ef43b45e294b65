"""The optimizer's state by parameter: pieces brought together on one process each, and back.

Each parameter (with tensor parallelism, each shard of it; of a stack of matrices, each matrix) has
one owner among the data-parallel processes; owners have about equally many elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .assignment import assign
from .exchange import Item, gather, scatter
from .flat_shards import FlatParameter, flat_parameters, members
from .muon_with_adamw import MuonWithAdamW

FP32_WEIGHT = "param"  # names of megatron-core's checkpoints
ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum",)


@dataclass(frozen=True)
class Entry:
    """One tensor of the optimizer's state.

    Attributes:
        state: what it is: 'param', 'exp_avg', 'exp_avg_sq' or 'momentum'.
        chunk: number of the parameter's model chunk on this process.
        name: the parameter's plain name.
        matrix: number of the matrix in a parameter that is a stack of them, else None.
    """

    state: str
    chunk: int
    name: str
    matrix: int | None = None


def owned_entries(optimizer: Any) -> dict[Entry, torch.nn.Parameter]:
    """What this process owns, and the parameters it belongs to."""
    return {
        entry: flat.parameter
        for member in members(optimizer)
        for items, flats in _by_state(member)
        for (entry, item), flat in zip(items.items(), flats, strict=True)
        if item.owner == member.data_parallel_group.rank()
    }


def gather_state(optimizer: Any) -> dict[Entry, torch.Tensor]:
    """What this process owns, fp32 in the shapes of parameters; every process must call this."""
    result = {}
    for member in members(optimizer):
        _allocate(member.optimizer)
        for items, flats in _by_state(member):
            local = {
                entry: _piece(member.optimizer, entry, flat)
                for entry, flat in zip(items, flats, strict=True)
                if flat.main is not None
            }
            device = flats[0].parameter.device
            gathering = gather(items, local, torch.float32, device, member.data_parallel_group)
            shapes = {entry: flat.shape for entry, flat in zip(items, flats, strict=True)}
            for entry, whole in gathering.wait().items():
                result[entry] = whole.view(shapes[entry])
    return result


def scatter_state(optimizer: Any, whole: Mapping[Entry, torch.Tensor], steps: int) -> None:
    """Put state back into the pieces; every process must call this.

    Args:
        optimizer: megatron-core's.
        whole: what this process owns.
        steps: updates made so far.
    """
    for member in members(optimizer):
        _allocate(member.optimizer)
        _set_steps(member.optimizer, steps)
        for items, flats in _by_state(member):
            device = flats[0].parameter.device
            owned = {entry: whole[entry].flatten() for entry in items if entry in whole}
            scattering = scatter(items, owned, torch.float32, device, member.data_parallel_group)
            pieces = scattering.wait()
            for entry, flat in zip(items, flats, strict=True):
                if flat.main is not None:
                    _piece(member.optimizer, entry, flat).copy_(pieces[entry])


def scatter_weights(optimizer: Any, whole: Mapping[Entry, torch.Tensor]) -> None:
    """As `scatter_state` for the fp32 weights alone; moments and number of updates stay."""
    for member in members(optimizer):
        items, flats = next(_by_state(member))
        device = flats[0].parameter.device
        owned = {entry: whole[entry].flatten() for entry in items if entry in whole}
        pieces = scatter(items, owned, torch.float32, device, member.data_parallel_group).wait()
        for entry, flat in zip(items, flats, strict=True):
            if flat.main is not None:
                flat.local(flat.main.detach()).copy_(pieces[entry])


def step_count(optimizer: Any) -> int:
    """Updates made so far."""
    inner = members(optimizer)[0].optimizer
    if isinstance(inner, MuonWithAdamW):
        return inner.steps
    steps = [state["step"] for state in inner.state.values() if "step" in state]
    steps += [group["step"] for group in inner.param_groups if "step" in group]
    return int(steps[0]) if steps else 0


def _by_state(member: Any) -> Iterator[tuple[dict[Entry, Item], list[FlatParameter]]]:
    """For each kind of state its entries, the same on each process, and their parameters."""
    flats = flat_parameters(member)
    sizes = [flat.shape.numel() for flat in flats]
    owners = assign(sizes, member.data_parallel_group.size())
    muon = _muon_parameters(member.optimizer)
    for state in (FP32_WEIGHT, *ADAMW_STATE, *MUON_STATE):
        items: dict[Entry, Item] = {}
        with_state = []
        for flat, owner in zip(flats, owners, strict=True):
            theirs = MUON_STATE if flat.parameter in muon else ADAMW_STATE
            if state == FP32_WEIGHT or state in theirs:
                items[Entry(state, flat.chunk, flat.name, flat.matrix)] = Item(owner, flat.pieces)
                with_state.append(flat)
        if items:
            yield items, with_state


def _muon_parameters(inner: Any) -> set[torch.nn.Parameter]:
    if not isinstance(inner, MuonWithAdamW):
        return set()
    return {weight.flat.parameter for weight in inner.muon.weights}


def _piece(inner: Any, entry: Entry, flat: FlatParameter) -> torch.Tensor:
    """This process's piece of an entry, flat."""
    assert flat.main is not None
    if entry.state == FP32_WEIGHT:
        return flat.local(flat.main.detach())
    return flat.local(inner.state[flat.main][entry.state])


def _allocate(inner: Any) -> None:
    """Give AdamW the state it makes itself with its first step."""
    adamw = inner.adamw if isinstance(inner, MuonWithAdamW) else inner
    for group in adamw.param_groups:
        for main in group["params"]:
            state = adamw.state[main]
            if not state:
                state.update({name: torch.zeros_like(main) for name in ADAMW_STATE})
                if isinstance(adamw, torch.optim.Adam):
                    state["step"] = torch.zeros(())


def _set_steps(inner: Any, steps: int) -> None:
    """Set the number of updates: of each tensor in torch's Adam, of groups in fused ones."""
    if isinstance(inner, MuonWithAdamW):
        inner.steps = steps
        inner = inner.adamw
    if not isinstance(inner, torch.optim.Adam):
        for group in inner.param_groups:
            group["step"] = steps
        return
    for state in inner.state.values():
        state["step"].fill_(steps)
