"""The learning-rate schedule: warm-up, stable, decay (WSD)."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_kanana.config import Settings


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
