"""AdamW in megatron-core's distributed optimizer, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_kanana.config import Settings
from megatron_kanana.device import Device


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
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel], settings: Settings, device: Device
) -> Any:
    """AdamW over all parameters; weight decay on matrices, and on norms if asked for."""
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
    # Without overrides megatron-core spares vectors; with an empty set of them it spares nothing.
    overrides: dict[Any, Any] | None = {} if optimizer.decay_norms else None
    return get_megatron_optimizer(config, chunks, config_overrides=overrides)


def build_scheduler(optimizer: Any, settings: Settings) -> OptimizerParamScheduler:
    """Linear warm-up from zero, stable, decay (WSD); one scheduler step a training step."""
    schedule = settings.schedule
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.optimizer.learning_rate,
        min_lr=schedule.minimum_learning_rate,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=schedule.steps,
        lr_decay_style="WSD",
        wsd_decay_steps=schedule.decay_steps,
        lr_wsd_decay_style=schedule.decay_style,
        start_wd=settings.optimizer.weight_decay,
        end_wd=settings.optimizer.weight_decay,
        wd_incr_steps=schedule.steps,
        wd_incr_style="constant",
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
