"""Checkpoint form of a parameter that is a stack of matrices: each matrix is a part of its own.

megatron-core's SequentialMLP writes each expert as one index of a leading axis; so does this, so
that a checkpoint has the same tensors however the experts are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Sharded: TypeAlias = "ShardedTensor | ShardedTensorFactory"


@dataclass
class MatrixStack(ShardedTensorFactory):
    """A parameter [matrices, rows, columns] in megatron-core's sharded state dict.

    Attributes:
        matrices: how each matrix lies in the checkpoint, of whatever key and replica.
    """

    matrices: tuple[Sharded, ...] = ()


def matrix_stack(stack: torch.Tensor, matrices: Sequence[Sharded]) -> MatrixStack:
    """The stack, given what each of its matrices would be in a sharded state dict by itself.

    Args:
        stack: [matrices, rows, columns].
        matrices: of one key and replica, in the order of the stack.
    """
    forms = tuple(matrices)

    def build(key: str, data: torch.Tensor, replica_id: Any, _: slice | None) -> list[Any]:
        return [
            part
            for form, matrix in zip(forms, data, strict=True)
            for part in _parts(described_as(form, matrix, key=key, replica_id=replica_id))
        ]

    def merge(loaded: list[Any]) -> torch.Tensor:
        number = len(loaded) // len(forms)
        return torch.stack(
            [
                _merged(form, loaded[index * number : (index + 1) * number])
                for index, form in enumerate(forms)
            ]
        )

    first = forms[0]
    return MatrixStack(first.key, stack, build, merge, first.replica_id, matrices=forms)


def described_as(form: Sharded, data: torch.Tensor, **changes: Any) -> Sharded:
    """`data` in the place of what `form` describes, which is of the same shape."""
    if isinstance(form, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(form, data=data, **changes)


def _parts(form: Sharded) -> list[Any]:
    return list(form.build()) if isinstance(form, ShardedTensorFactory) else [form]


def _merged(form: Sharded, loaded: list[Any]) -> torch.Tensor:
    whole: torch.Tensor = (
        form.merge_fn(loaded) if isinstance(form, ShardedTensorFactory) else loaded[0]
    )
    return whole
