"""Muon over the pieces of megatron-core's distributed optimizer.

Momenta and fp32 weights stay where the distributed optimizer keeps gradients: in equal flat pieces
over the data-parallel processes. In each round the momenta of some weights are brought together
on their owners, orthogonalised there, and the updates dealt out again, while the next round's
momenta are on their way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megatron_kanana.config.schema import ModelSettings, OptimizerSettings

from .assignment import assign, orthogonalization_cost, rounds
from .exchange import Item, Pending, gather, scatter
from .flat_shards import FlatParameter
from .logical_matrices import Rule, matrix_shapes, merge, rule_of, split
from .matrix_groups import MatrixGroup
from .muon import directions, nesterov_momentum

ROUND_ELEMENTS = 64 * 2**20  # of weights that one process orthogonalises at a time

Key = tuple[int, int]
"""Number of a weight in its round, and of its tensor-parallel shard or copy."""
Tensors = dict[Key, torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight that Muon updates.

    Attributes:
        flat: where its pieces lie.
        rule: which matrices it holds.
        num_shards: tensor-parallel shards it is split into; 1 if every process has all of it.
    """

    flat: FlatParameter
    rule: Rule
    num_shards: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole weight."""
        rows, columns = self.flat.shape
        if self.rule.shard_axis == 0:
            return rows * self.num_shards, columns
        return rows, columns * self.num_shards

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole weight from its flat shards."""
        parts = [shard.view(self.flat.shape) for shard in shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.rule.shard_axis or 0)

    def cut(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The flat shards of the whole weight."""
        return [
            shard.flatten() for shard in whole.chunk(self.num_shards, self.rule.shard_axis or 0)
        ]


@dataclass(frozen=True)
class Round:
    """Weights whose momenta are brought together at the same time.

    Attributes:
        weights: the weights.
        owners: rank of each one's owner.
        gathers: each shard, once, from those who hold it to the owner.
        scatters: each shard, or where the weight is not split each copy, from the owner to all.
    """

    weights: list[Weight]
    owners: list[int]
    gathers: dict[Key, Item]
    scatters: dict[Key, Item]


class DistributedMuon:
    """Muon for the weights of one distributed optimizer.

    Attributes:
        weights: what it updates.
        state: for each parameter's fp32 piece, its 'momentum', flat.

    Args:
        weights: the weights, the same on every process of `group`, in the same order.
        group: the processes that hold them.
        settings: momentum, method, scale.
        model: sizes of the logical matrices.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        group: MatrixGroup,
        settings: OptimizerSettings,
        model: ModelSettings,
    ) -> None:
        self.weights = list(weights)
        self._group = group
        self._settings = settings
        self._model = model
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {
            main: {"momentum": torch.zeros_like(main)}
            for main in dict.fromkeys(weight.flat.main for weight in weights)
            if main is not None
        }
        self._rounds = _plan(weights, group, settings.per_head, model)
        self._device = weights[0].flat.parameter.device if weights else torch.device("cpu")
        # What orthogonalises in 16 bits anyway is sent in 16 bits.
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        """Update the fp32 weights from their gradients."""
        if not self._rounds:
            return
        gathering = self._gather(self._rounds[0])
        returning: tuple[Round, Pending[Tensors]] | None = None
        for following, this in zip([*self._rounds[1:], None], self._rounds, strict=True):
            gathered = gathering.wait()
            if following is not None:
                gathering = self._gather(following)
            scattering = self._scatter(this, gathered)
            if returning is not None:
                self._apply(*returning)
            returning = this, scattering
        if returning is not None:
            self._apply(*returning)

    def _gather(self, this: Round) -> Pending[Tensors]:
        """Move the momenta of this process's pieces, and send them to the owners."""
        local: Tensors = {}
        for index, weight in enumerate(this.weights):
            if (main := weight.flat.main) is not None:
                assert main.grad is not None
                gradient = weight.flat.local(main.grad)
                momentum = weight.flat.local(self.state[main]["momentum"])
                local[index, self._group.shard] = nesterov_momentum(
                    gradient, momentum, self._settings.momentum, self._dtype
                )
        group = self._group.process_group
        return gather(this.gathers, local, self._dtype, self._device, group)

    def _scatter(self, this: Round, gathered: Tensors) -> Pending[Tensors]:
        """Orthogonalise the weights this process owns, and send the updates to the holders."""
        group = self._group
        owned = {
            index: weight
            for index, (weight, owner) in enumerate(zip(this.weights, this.owners, strict=True))
            if owner == group.process_group.rank()
        }
        whole = [
            weight.join([gathered[index, shard] for shard in range(weight.num_shards)])
            for index, weight in owned.items()
        ]
        updates: Tensors = {}
        for (index, weight), update in zip(
            owned.items(), self._updates(list(owned.values()), whole), strict=True
        ):
            shards = weight.cut(update)
            for copy in range(group.num_shards):
                updates[index, copy] = shards[copy % len(shards)]
        return scatter(this.scatters, updates, self._dtype, self._device, group.process_group)

    def _updates(
        self, weights: Sequence[Weight], ahead: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Updates of whole weights from their whole momenta."""
        model, settings = self._model, self._settings
        parts = [
            split(weight.rule, momentum, model, weight.num_shards, settings.per_head)
            for weight, momentum in zip(weights, ahead, strict=True)
        ]
        results = iter(
            directions(
                [matrix for matrices in parts for matrix in matrices],
                settings.orthogonalization,
                settings.orthogonalization_steps,
                settings.update_scale,
            )
        )
        return [
            merge(weight.rule, [next(results) for _ in matrices], model, weight.num_shards)
            for weight, matrices in zip(weights, parts, strict=True)
        ]

    def _apply(self, this: Round, returning: Pending[Tensors]) -> None:
        """Decay this process's pieces and move them, with the rates of their parameter group."""
        updates = returning.wait()
        for index, weight in enumerate(this.weights):
            main, rates = weight.flat.main, weight.flat.group
            if main is None or rates is None:
                continue
            piece = weight.flat.local(main)
            piece.mul_(1.0 - rates["lr"] * rates["weight_decay"])
            piece.add_(updates[index, self._group.shard], alpha=-rates["lr"])


def muon_weights(flats: Sequence[FlatParameter], num_shards: int) -> list[Weight]:
    """Weights with their rules.

    Args:
        flats: parameters that Muon updates.
        num_shards: size of the tensor parallelism they are split over.

    Raises:
        RuntimeError: megatron-core splits a parameter along another axis than the table says.
    """
    weights = []
    for flat in flats:
        rule = rule_of(flat.name)
        if num_shards > 1:
            _check_shard_axis(flat, rule)
        split_over = 1 if rule.shard_axis is None else num_shards
        weights.append(Weight(flat, rule, split_over))
    return weights


def _check_shard_axis(flat: FlatParameter, rule: Rule) -> None:
    is_split = getattr(flat.parameter, "tensor_model_parallel", False)
    axis = None
    if is_split:
        stacked = flat.parameter.dim() - len(flat.shape)
        axis = flat.parameter.partition_dim - stacked  # type: ignore[attr-defined]
    if axis != rule.shard_axis:
        raise RuntimeError(
            f"LOGICAL_MATRICES says that {flat.name} is split along {rule.shard_axis}, but"
            f" megatron-core splits it along {axis}"
        )


def _plan(
    weights: Sequence[Weight],
    group: MatrixGroup,
    per_head: Collection[str],
    model: ModelSettings,
) -> list[Round]:
    """Owners and rounds; the same on every process."""
    costs = [
        orthogonalization_cost(
            matrix_shapes(weight.rule, weight.shape, model, weight.num_shards, per_head)
        )
        for weight in weights
    ]
    owners = assign(costs, group.process_group.size())
    sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
    # Weights of one shape follow one another, so that they make a batch.
    order = sorted(range(len(weights)), key=lambda index: (weights[index].shape, index))
    return [
        _round([weights[index] for index in indices], [owners[index] for index in indices], group)
        for indices in rounds(owners, sizes, order, ROUND_ELEMENTS)
    ]


def _round(weights: list[Weight], owners: list[int], group: MatrixGroup) -> Round:
    items = {
        (index, shard): Item(owner, group.pieces(shard, weight.flat.pieces))
        for index, (weight, owner) in enumerate(zip(weights, owners, strict=True))
        for shard in range(group.num_shards)
    }
    gathers = {
        (index, shard): item
        for (index, shard), item in items.items()
        if shard < weights[index].num_shards
    }
    return Round(weights, owners, gathers, items)
