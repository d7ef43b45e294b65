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
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_kanana.config import Settings
from megatron_kanana.config.ledger import Ledger
from megatron_kanana.optimizer.weight_average import WEIGHT_AVERAGE, WeightAverage
from megatron_kanana.optimizer.whole_state import scatter_weights, step_count

from . import optimizer_state
from .safe_load import load_common, load_sharded


class Guards(Protocol):
    """What watches the steps, and remembers the last ones."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Run(Protocol):
    """What is saved and restored."""

    settings: Settings
    chunks: list[Any]
    tokenizer: Any
    optimizer: Any
    scheduler: Any
    weight_average: WeightAverage | None
    step: int
    consumed_samples: int
    earlier_tokens: dict[str, int]

    @property
    def guards(self) -> Guards: ...
    @property
    def ledger(self) -> Ledger: ...


def saved_state(run: Run) -> dict[str, Any]:
    """The run's state as megatron-core's sharded state dict, to be saved."""
    model = model_state(run.chunks)
    return {
        **model,
        "optimizer": optimizer_state.to_save(run.optimizer, model),
        "optimizer_step": step_count(run.optimizer),
        "scheduler": run.scheduler.state_dict(),
        **_weight_average(run, model),
        "random": _sharded_random_state(),
        "step": run.step,
        "consumed_samples": run.consumed_samples,
        "guards": run.guards.state(),
        "layout": _layout(run.settings),
    }


def load(run: Run, path: Path) -> None:
    """Restore model, optimizer, schedule, position and, under an unchanged layout, random state.

    A checkpoint of weights alone, as conversion makes them, starts a run of its own: the rest
    stays as it was built.
    """
    common = load_common(path)
    if common.get("weights_only"):
        load_for_new_run(run, path, with_optimizer=False)
        return
    saved_layout = common["layout"]
    model = model_state(run.chunks)
    optimizer = optimizer_state.to_load(run.optimizer, model)
    optimizer_state.check_stored(optimizer, path, run.settings.optimizer.name)
    wanted = {**model, "optimizer": optimizer, **_stored_weight_average(run, model, path)}
    same_layout = saved_layout == _layout(run.settings)
    if same_layout:
        wanted["random"] = _sharded_random_state()
    put_back(run, load_sharded(wanted, path), same_layout=same_layout)


def put_back(run: Run, state: dict[str, Any], *, same_layout: bool) -> None:
    """Take what was loaded into the run; every process must call this.

    Args:
        run: as it was built, or at another step.
        state: what `saved_state` had, as plain tensors and values.
        same_layout: whether it holds the random state of this process.
    """
    _load_model(run.chunks, state)
    optimizer_state.load(run.optimizer, state["optimizer"], state["optimizer_step"])
    if run.weight_average is not None:
        run.weight_average.reset()
        if WEIGHT_AVERAGE in state:
            run.weight_average.scatter(state[WEIGHT_AVERAGE])
    run.scheduler.load_state_dict(state["scheduler"])
    run.step = state["step"]
    run.consumed_samples = state["consumed_samples"]
    if "guards" in state:  # not in those of earlier versions
        run.guards.restore(state["guards"])
    if same_layout:
        _restore_random_state(state["random"])


def load_for_new_run(run: Run, path: Path, *, with_optimizer: bool) -> None:
    """Restore the weights, and the optimizer's moments if wanted; step and schedule stay.

    Of weights that were trained in a shorter format, the optimizer's fp32 ones are taken where the
    checkpoint has them.
    """
    if with_optimizer:
        model = model_state(run.chunks)
        optimizer = optimizer_state.to_load(run.optimizer, model)
        optimizer_state.check_stored(optimizer, path, run.settings.optimizer.name)
        state = load_sharded({**model, "optimizer": optimizer}, path)
        _load_model(run.chunks, state)
        optimizer_state.load(run.optimizer, state["optimizer"], state["optimizer_step"])
    else:
        load_model(run.chunks, path)
        run.optimizer.reload_model_params()
        model = model_state(run.chunks)
        weights = optimizer_state.weights_to_load(run.optimizer, model, path)
        if weights is not None:
            state = load_sharded({"optimizer": weights}, path)
            scatter_weights(run.optimizer, state["optimizer"])
    if run.weight_average is not None:
        run.weight_average.reset()


def _weight_average(run: Run, model: dict[str, Any]) -> dict[str, Any]:
    """Averaged weights as a part of what is saved; every process must call this."""
    average = run.weight_average
    if average is None:
        return {}
    tensors = optimizer_state.describe(average.gather(), average.owned_entries(), model)
    return {WEIGHT_AVERAGE: tensors}


def _stored_weight_average(run: Run, model: dict[str, Any], path: Path) -> dict[str, Any]:
    """Places for the averaged weights; nothing where the run or the checkpoint has none."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = optimizer_state.key(WEIGHT_AVERAGE, "")
    if run.weight_average is None or not any(name.startswith(prefix) for name in stored):
        return {}
    return {WEIGHT_AVERAGE: optimizer_state.places(run.weight_average.owned_entries(), model)}


def load_model(chunks: Sequence[Any], path: Path) -> None:
    """Restore the weights alone."""
    _load_model(chunks, load_sharded(model_state(chunks), path))


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Sharded state dicts of the model chunks; the tensors' keys are the same in every layout.

    They hold no extra states. megatron-core's own layers have empty ones. Those of Transformer
    Engine's are pickles, which loading would run, and hold nothing that is needed: the scales of
    `precision.fp8` are computed from what is multiplied.
    """
    return {
        f"model{index}": _without_extra_state(unwrap_model(chunk).sharded_state_dict())
        for index, chunk in enumerate(chunks)
    }


def _load_model(chunks: Sequence[Any], state: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        weights = _without_extra_state(
            state[f"model{index}"]
        )  # the local tier's of earlier versions
        result = unwrap_model(chunk).load_state_dict(weights, strict=False)
        missing = list(_without_extra_state(dict.fromkeys(result.missing_keys)))
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}


def _sharded_random_state() -> ShardedObject:
    return ShardedObject(
        "random_state", _random_state(), (dist.get_world_size(),), (dist.get_rank(),)
    )


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
