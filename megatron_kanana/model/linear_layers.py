"""The dense linear layers' classes: megatron-core's own, or those on Transformer Engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_kanana.kernels.fp8_blockwise import (
    blockwise_error,
    quantize_by_csrc,
)

logger = logging.getLogger(__name__)


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

KINDS = {
    "linear_q_proj": "query",
    "linear_q_down_proj": "query_down",
    "linear_q_up_proj": "query_up",
    "linear_kv_down_proj": "key_value_down",
    "linear_kv_up_proj": "key_value_up",
    "linear_proj": "attention_output",
    "linear_fc1": "gate_up",
    "linear_fc2": "down",
    "eh_proj": "mtp_projection",
}
"""Kinds of weights (`precision_settings.DENSE_WEIGHTS`) by megatron-core's names of layers."""


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
    for _, layer in _transformer_engine_layers(model):
        if layer.parallel_mode is None:
            layer.weight.tensor_model_parallel = False


def leave_out_of_fp8(model: torch.nn.Module, kinds: Collection[str]) -> None:
    """Have the layers of these kinds compute in bf16 inside a layer whose others are in fp8."""
    for name, layer in _transformer_engine_layers(model):
        if KINDS[name.rpartition(".")[2]] in kinds:
            layer.forward = _without_fp8(layer.forward)


def quantize_dense_by_csrc(model: torch.nn.Module) -> None:
    """Have the dense layers quantise by csrc's kernel (see `kernels.fp8_blockwise`) if they can."""
    if (error := blockwise_error()) is not None:
        logger.info("dense layers quantise by Transformer Engine (%s)", error)
        return
    logger.info("dense layers quantise by csrc (compiled operations found)")
    for _, layer in _transformer_engine_layers(model):
        quantize_by_csrc(layer)


def _without_fp8(forward: Callable[..., Any]) -> Callable[..., Any]:
    from transformer_engine.pytorch import fp8_autocast

    def in_bf16(*args: Any, **options: Any) -> Any:
        with fp8_autocast(enabled=False):
            return forward(*args, **options)

    return in_bf16


def _transformer_engine_layers(model: torch.nn.Module) -> Iterable[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            yield name, module
