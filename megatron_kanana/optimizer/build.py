"""megatron-core's data parallelism and distributed optimizer, set up from the settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_kanana.config import Settings
from megatron_kanana.device import Device

from .muon_with_adamw import give_matrices_to_muon
from .parameter_groups import parameter_group_overrides


def wrap_data_parallel(
    chunks: list[torch.nn.Module], settings: Settings
) -> list[DistributedDataParallel]:
    """Put each model chunk behind megatron-core's data parallelism.

    The distributed optimizer is always on, on one process too, so that a checkpoint has one form.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.precision.reduce_gradients_in_fp32,
        overlap_grad_reduce=settings.parallel.overlap_gradient_reduction,
        use_distributed_optimizer=True,
    )
    add_weight_gradients_in_place(chunks)
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def add_weight_gradients_in_place(chunks: Iterable[torch.nn.Module]) -> None:
    """Have Transformer Engine's layers add their weight gradients to `main_grad` from here on.

    megatron-core's `gradient_accumulation_fusion` would be for all layers at once, and its own need
    Apex for it.
    """
    layers: Iterable[Any] = itertools.chain.from_iterable(chunk.modules() for chunk in chunks)
    for layer in layers:
        if hasattr(layer, "fuse_wgrad_accumulation"):
            layer.fuse_wgrad_accumulation = True


def build_optimizer(
    chunks: list[DistributedDataParallel], settings: Settings, device: Device
) -> Any:
    """AdamW over all parameters, or Muon over the matrices and AdamW over the rest.

    Raises:
        UnknownParameterError: with Muon or muP, for parameters the table of logical matrices lacks.
    """
    optimizer = settings.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=settings.schedule.minimum_learning_rate,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.gradient_clip_norm or math.inf,  # at 0 no norm would be computed
        bf16=device.dtype == torch.bfloat16,
        params_dtype=device.dtype,
        use_distributed_optimizer=True,
    )
    names = {name for chunk in chunks for name, _ in chunk.named_parameters()}
    overrides = parameter_group_overrides(config, settings, names)
    result = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    if optimizer.name == "muon":
        give_matrices_to_muon(result, settings)
    return result
