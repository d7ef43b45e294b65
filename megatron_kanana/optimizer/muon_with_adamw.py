"""Muon inside megatron-core's distributed optimizer, beside the AdamW that it was built with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_kanana.config import Settings

from .distributed_muon import DistributedMuon, muon_weights
from .flat_shards import flat_parameters, members
from .matrix_groups import dense_process_group, expert_process_group, matrix_group
from .parameter_groups import MUON_GROUP, is_muon_parameter


class MuonWithAdamW:
    """What a distributed optimizer steps: Muon for some parameter groups, AdamW for the others.

    megatron-core reads gradients, norms and rates from `param_groups` and calls `step`; it copies
    gradients in and weights out itself.

    Attributes:
        param_groups: all groups, as megatron-core made them.
        adamw: the optimizer megatron-core chose, left with its groups.
        muon: Muon.
        steps: updates made.
    """

    def __init__(self, adamw: torch.optim.Optimizer, muon: DistributedMuon) -> None:
        self.param_groups = adamw.param_groups
        self.adamw = adamw
        self.muon = muon
        self.steps = 0
        adamw.param_groups = [group for group in self.param_groups if MUON_GROUP not in group]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """State of every fp32 piece."""
        return {**self.adamw.state, **self.muon.state}

    def step(self) -> None:
        """Update all pieces from their gradients."""
        self.muon.step()
        self.adamw.step()
        self.steps += 1

    def register_step_post_hook(self, hook: Callable[..., None]) -> Any:
        """Have `hook` called after each step, as torch's optimizers do."""
        return self.adamw.register_step_post_hook(hook)


def give_matrices_to_muon(optimizer: Any, settings: Settings) -> None:
    """Put Muon into megatron-core's optimizers for the groups marked as its; on every process."""
    # Before the loop, because a process without experts has no optimizer for them.
    process_groups = {False: dense_process_group(), True: expert_process_group()}
    shards = {
        False: (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        True: (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        ),
    }
    for member in members(optimizer):
        is_expert = bool(member.optimizer.param_groups[0]["is_expert_parallel"])
        num_shards, shard = shards[is_expert]
        group = matrix_group(
            process_groups[is_expert], num_shards, shard, member.data_parallel_group.rank()
        )
        flats = [
            flat
            for flat in flat_parameters(member)
            if is_muon_parameter(flat.name, settings.optimizer)
        ]
        weights = muon_weights(flats, num_shards)
        muon = DistributedMuon(weights, group, settings.optimizer, settings.model)
        member.optimizer = MuonWithAdamW(member.optimizer, muon)
