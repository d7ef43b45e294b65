"""An exponential moving average of the weights, in fp32 beside the distributed optimizer's pieces.

Averaged weights have less of the noise that a constant learning rate leaves; Kakao reads its sweeps
of learning rates from them (arXiv 2608.20061).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .assignment import assign
from .exchange import Item, gather, scatter
from .flat_shards import FlatParameter, flat_parameters, members
from .whole_state import Entry

WEIGHT_AVERAGE = "weight_average"


class WeightAverage:
    """Averages of this process's pieces; they are of the same form in every layout.

    After every `interval` steps

        average <- decay * average + (1 - decay) * weights

    The first time the average is the weights themselves, not to remember the initial ones.

    Args:
        optimizer: megatron-core's optimizer.
        decay: share of the average that stays.
        interval: steps between updates.
    """

    def __init__(self, optimizer: Any, decay: float, interval: int) -> None:
        self._members = members(optimizer)
        self._decay = decay
        self._interval = interval
        self._flats = [flat_parameters(member) for member in self._members]
        self._averages: dict[torch.Tensor, torch.Tensor] = {
            main: main.detach().clone()
            for main in dict.fromkeys(flat.main for flats in self._flats for flat in flats)
            if main is not None
        }

    def reset(self) -> None:
        """Start from the weights as they are."""
        for main, average in self._averages.items():
            average.copy_(main.detach())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step in, if their turn has come.

        Args:
            step: number of the step, from 1.
        """
        if step % self._interval:
            return
        if step == self._interval:
            self.reset()
        elif self._averages:
            torch._foreach_lerp_(
                list(self._averages.values()), list(self._averages), 1.0 - self._decay
            )

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Meanwhile the model has the averaged weights; every process must call this."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def owned_entries(self) -> dict[Entry, torch.nn.Parameter]:
        """Averages this process saves, and the parameters they belong to."""
        return {
            entry: flat.parameter
            for member, flats in zip(self._members, self._flats, strict=True)
            for (entry, item), flat in zip(_items(member, flats).items(), flats, strict=True)
            if item.owner == member.data_parallel_group.rank()
        }

    def gather(self) -> dict[Entry, torch.Tensor]:
        """What this process owns, in the shapes of parameters; every process must call this."""
        result = {}
        for member, flats in zip(self._members, self._flats, strict=True):
            items = _items(member, flats)
            local = {
                entry: flat.local(self._averages[flat.main])
                for entry, flat in zip(items, flats, strict=True)
                if flat.main is not None
            }
            device, group = flats[0].parameter.device, member.data_parallel_group
            shapes = {entry: flat.shape for entry, flat in zip(items, flats, strict=True)}
            for entry, whole in gather(items, local, torch.float32, device, group).wait().items():
                result[entry] = whole.view(shapes[entry])
        return result

    def scatter(self, whole: Mapping[Entry, torch.Tensor]) -> None:
        """Put averages back into the pieces; every process must call this.

        Args:
            whole: what this process owns.
        """
        for member, flats in zip(self._members, self._flats, strict=True):
            items = _items(member, flats)
            owned = {entry: whole[entry].flatten() for entry in items if entry in whole}
            device, group = flats[0].parameter.device, member.data_parallel_group
            pieces = scatter(items, owned, torch.float32, device, group).wait()
            for entry, flat in zip(items, flats, strict=True):
                if flat.main is not None:
                    flat.local(self._averages[flat.main]).copy_(pieces[entry])

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange weights and averages; the model gets what were the averages."""
        for main, average in self._averages.items():
            weights = main.detach().clone()
            main.copy_(average)
            average.copy_(weights)
        for member in self._members:
            member._copy_main_params_to_model_params()
        for chunk in self._members[0].model_chunks:
            chunk.start_param_sync()


def _items(member: Any, flats: list[FlatParameter]) -> dict[Entry, Item]:
    """The averages of one distributed optimizer, each with its owner."""
    owners = assign([flat.shape.numel() for flat in flats], member.data_parallel_group.size())
    return {
        Entry(WEIGHT_AVERAGE, flat.chunk, flat.name, flat.matrix): Item(owner, flat.pieces)
        for flat, owner in zip(flats, owners, strict=True)
    }
