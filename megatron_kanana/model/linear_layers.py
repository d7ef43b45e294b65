"""The dense linear layers' classes: megatron-core's own, or those on Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class LinearLayers:
    """Classes that a layer's specification names.

    Attributes:
        column: split over tensor parallelism by outputs.
        row: split by inputs.
        whole: the same on every process; an exact class that megatron-core's MLA knows.
    """

    column: type
    row: type
    whole: type


IN_TORCH = LinearLayers(ColumnParallelLinear, RowParallelLinear, Linear)


def linear_layers(backend: str) -> LinearLayers:
    """Of `kernels.linear_backend`, 'te' or 'torch'; parameters have the same names in both."""
    if backend == "torch":
        return IN_TORCH
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELinear,
        TERowParallelLinear,
    )

    return LinearLayers(TEColumnParallelLinear, TERowParallelLinear, TELinear)


def mark_whole_layers(model: torch.nn.Module) -> None:
    """Say of whole layers' weights that each process has all of them.

    Transformer Engine marks the weights of all its layers as split (`module/linear.py`,
    `reset_parameters`), and megatron-core would add the gradients of every tensor-parallel
    process's copy to the global norm.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "fuse_wgrad_accumulation") and module.parallel_mode is None:
            module.weight.tensor_model_parallel = False
