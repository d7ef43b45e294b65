"""The optimizer's part of a checkpoint, in a form that no layout changes.

megatron-core makes one optimizer, or a dense and an expert one, depending on the layout, and nests
its state accordingly. Here only the tensors (stored parameter by parameter) and the number of
steps are kept; learning rates and other hyperparameters come from the settings of the run.
"""

from __future__ import annotations

from typing import Any

import torch

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}

Parts = list[dict[str, Any]]
"""megatron-core's sharded state dict of each optimizer in the chain."""


def sharded_parts(optimizer: Any, model: dict[str, Any], *, is_loading: bool) -> Parts:
    """State of each optimizer in the chain.

    Args:
        optimizer: megatron-core's optimizer.
        model: sharded state dicts of the model chunks, which name the parameters.
        is_loading: whether the tensors are places to load into.
    """
    if is_loading:
        _allocate(optimizer)
    state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
    return [state] if "param_state" in state else [state[key] for key in sorted(state)]


def tensors(parts: Parts) -> dict[int, Any]:
    """What is stored: the tensors alone."""
    return {index: part["param_state"] for index, part in enumerate(parts)}


def step_count(parts: Parts) -> int:
    """Updates the optimizer has made."""
    return int(parts[0]["optimizer"]["param_groups"][0]["step"])


def load(optimizer: Any, parts: Parts, loaded: dict[int, Any], steps: int) -> None:
    """Put loaded tensors and the number of steps back."""
    for index, (member, part) in enumerate(zip(_members(optimizer), parts, strict=True)):
        if isinstance(member.optimizer, torch.optim.Adam):
            _load_into_torch_adam(member, loaded[index], steps)
            continue
        for group in part["optimizer"]["param_groups"]:
            group["step"] = steps
        member.load_state_dict({**part, "param_state": loaded[index]})


def _members(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _allocate(optimizer: Any) -> None:
    """Give torch's Adam its state before the first step; megatron-core reads `step` from it."""
    for member in _members(optimizer):
        if isinstance(member.optimizer, torch.optim.Adam):
            for parameter in _parameters(member):
                member.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _load_into_torch_adam(member: Any, param_state: dict[int, Any], steps: int) -> None:
    # megatron-core stores no `step` tensors but looks for them when it loads, so they stand aside.
    for parameter in _parameters(member):
        del member.optimizer.state[parameter]["step"]
    member.load_parameter_state_from_fully_reshardable(param_state)
    for parameter in _parameters(member):
        member.optimizer.state[parameter]["step"] = torch.tensor(float(steps))


def _parameters(member: Any) -> list[torch.Tensor]:
    return [parameter for group in member.optimizer.param_groups for parameter in group["params"]]
