"""Combinations of settings that cannot work, each with its remedy.

One function a subject, here and in the `check_*.py` beside; each yields every
problem it finds. Limits of a single setting are declared beside it in `schema.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .check_cluster import check_cluster
from .check_dispatcher import check_dispatcher
from .check_files import check_checkpoint, check_data
from .check_kernels import check_kernels
from .check_layout import check_model, check_sharding, check_world
from .check_linear_kernels import (
    check_linear_kernels,
    check_norm_kernels,
    check_rope_kernels,
)
from .check_loss_kernels import check_loss_kernels
from .check_moe_kernels import check_moe_kernels
from .check_order import check_growing_tokens
from .check_precision import check_precision
from .check_watchdog import check_watchdog
from .environment import TESTED_MEGATRON_CORE, Environment, resolve_device
from .problems import Problem
from .schema import Settings


def check(
    settings: Settings, environment: Environment, *, with_files: bool = True
) -> list[Problem]:
    """Every wrong combination in `settings` for this machine and launch.

    Args:
        settings: limits of single settings have been checked.
        environment: the machine and the launch.
        with_files: whether files that the settings name must be there.
    """
    subjects = [
        check_versions,
        check_device,
        check_kernels,
        check_moe_kernels,
        check_loss_kernels,
        check_linear_kernels,
        check_norm_kernels,
        check_rope_kernels,
        check_precision,
        check_model,
        check_sharding,
        check_dispatcher,
        check_world,
        check_schedule,
        check_optimizer,
        check_transfer,
        check_cluster,
        check_watchdog,
    ]
    if with_files:
        subjects += [check_data, check_checkpoint]
    return [problem for subject in subjects for problem in subject(settings, environment)]


def check_versions(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Only tested versions of megatron-core are run."""
    version = environment.megatron_core_version
    if version not in TESTED_MEGATRON_CORE:
        wanted = " or ".join(TESTED_MEGATRON_CORE)
        yield Problem(
            "megatron-core",
            version or "not installed",
            "this project was not tested with this version",
            f"pip install megatron-core=={TESTED_MEGATRON_CORE[0]} (tested: {wanted})",
        )


def check_device(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The machine has what device asks for."""
    device = resolve_device(settings.device, environment)
    if device == "cuda" and not environment.has_cuda:
        yield Problem("device", "cuda", "no CUDA device is visible", "set device=cpu or auto")
    elif device == "cuda" and environment.local_world_size > environment.cuda_device_count:
        yield Problem(
            "torchrun --nproc-per-node",
            environment.local_world_size,
            f"this machine has {environment.cuda_device_count} CUDA devices",
            "start one process a device",
        )


def check_schedule(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Warm-up, decay and their learning rates fit the run."""
    schedule, optimizer = settings.schedule, settings.optimizer
    if schedule.warmup_steps >= schedule.steps:
        yield Problem(
            "schedule.warmup_steps",
            schedule.warmup_steps,
            f"leaves nothing of schedule.steps = {schedule.steps}",
            f"choose at most {schedule.steps - 1}",
        )
    elif schedule.warmup_steps + schedule.decay_steps > schedule.steps:
        yield Problem(
            "schedule.warmup_steps + schedule.decay_steps",
            schedule.warmup_steps + schedule.decay_steps,
            f"is longer than schedule.steps = {schedule.steps}",
            "shorten one of them, or train longer",
        )
    changes = [change.tokens for change in schedule.batch_size_changes]
    yield from check_growing_tokens("schedule.batch_size_changes", changes)
    if schedule.minimum_learning_rate > optimizer.learning_rate:
        yield Problem(
            "schedule.minimum_learning_rate",
            schedule.minimum_learning_rate,
            f"is above optimizer.learning_rate = {optimizer.learning_rate}",
            "choose a smaller one",
        )


def check_transfer(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The base model of muP has whole heads of the model's size."""
    model, base = settings.model, settings.transfer.base_hidden_size
    if base is not None and model.num_attention_heads * base % model.hidden_size:
        head = model.hidden_size // math.gcd(model.hidden_size, model.num_attention_heads)
        yield Problem(
            "transfer.base_hidden_size",
            base,
            f"has no whole number of heads: there are model.num_attention_heads ="
            f" {model.num_attention_heads} for model.hidden_size = {model.hidden_size}",
            f"choose a multiple of {head}",
        )


def check_optimizer(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Each kind of weights has one optimizer, and heads are told apart where Muon sees them."""
    optimizer = settings.optimizer
    for kind in optimizer.muon_kinds:
        if kind in optimizer.adamw_kinds:
            yield Problem(
                "optimizer.muon_kinds",
                kind,
                "optimizer.adamw_kinds has it too",
                "leave it in one of them",
            )
    kinds = {
        "query": "query" if settings.model.q_lora_rank is None else "query_up",
        "key": "key_value_up",
        "value": "key_value_up",
    }
    for part in optimizer.per_head:
        if optimizer.name != "muon":
            yield Problem(
                "optimizer.per_head",
                part,
                f"optimizer.name = {optimizer.name} knows no matrices",
                "leave it out, or set optimizer=muon",
            )
        elif kinds[part] in optimizer.adamw_kinds:
            yield Problem(
                "optimizer.per_head",
                part,
                f"optimizer.adamw_kinds leaves {kinds[part]} to AdamW",
                "leave it out of one of them",
            )
