"""What a checkpoint holds, and how it goes back into a run, whatever the layout of either."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_kanana.config import Settings

# Optimizer state is stored parameter by parameter, so that it loads under any layout.
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class Run(Protocol):
    """What is saved and restored."""

    settings: Settings
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    step: int
    consumed_samples: int


def sharded_state(run: Run, *, is_loading: bool, with_random_state: bool) -> dict[str, Any]:
    """The run's state as megatron-core's sharded state dict."""
    model = {
        f"model{index}": unwrap_model(chunk).sharded_state_dict()
        for index, chunk in enumerate(run.chunks)
    }
    state: dict[str, Any] = {
        **model,
        "optimizer": run.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=OPTIMIZER_METADATA
        ),
    }
    if with_random_state:
        state["random"] = ShardedObject(
            "random_state", _random_state(), (dist.get_world_size(),), (dist.get_rank(),)
        )
    if not is_loading:
        state["scheduler"] = run.scheduler.state_dict()
        state["step"] = run.step
        state["consumed_samples"] = run.consumed_samples
        state["layout"] = _layout(run.settings)
        state["settings"] = dataclasses.asdict(run.settings)
    return state


def load(run: Run, path: Path) -> None:
    """Restore model, optimizer, schedule, position and, under an unchanged layout, random state."""
    saved_layout = dist_checkpointing.load_common_state_dict(str(path))["layout"]
    same_layout = saved_layout == _layout(run.settings)
    state = dist_checkpointing.load(
        sharded_state(run, is_loading=True, with_random_state=same_layout), str(path)
    )
    for index, chunk in enumerate(run.chunks):
        unwrap_model(chunk).load_state_dict(state[f"model{index}"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.step = state["step"]
    run.consumed_samples = state["consumed_samples"]
    if same_layout:
        _restore_random_state(state["random"])


def load_model(chunks: Sequence[Any], path: Path) -> None:
    """Restore the weights alone."""
    model = {
        f"model{index}": unwrap_model(chunk).sharded_state_dict()
        for index, chunk in enumerate(chunks)
    }
    state = dist_checkpointing.load(model, str(path))
    for index, chunk in enumerate(chunks):
        unwrap_model(chunk).load_state_dict(state[f"model{index}"])


def _layout(settings: Settings) -> dict[str, Any]:
    return {"world_size": dist.get_world_size(), **dataclasses.asdict(settings.parallel)}


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
