"""Models that take the same steps with the same weights: ours, and megatron-core's own.

All contenders on a GPU share one set of weights and one fp32 gradient of each, so that they fit
beside each other, and see the same data. Gradients are collected as megatron-core's data
parallelism collects them: what a layer has not added to `main_grad` itself, a hook adds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_kanana.config import Settings
from megatron_kanana.device import Device

from .megatron_model import megatron_model

_EXPERT = re.compile(r"(.*\.experts)\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)$")
_STACKS = {"1": "gate_up", "2": "down"}
_FUSED_NORMS = {
    "linear_kv_up_proj.layer_norm_weight": "kv_layernorm.weight",
    "linear_q_up_proj.layer_norm_weight": "q_layernorm.weight",
    "self_attention.linear_q_down_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Ends of names of norms that Transformer Engine fuses with the product after them."""


@dataclasses.dataclass
class Contender:
    """A model on this process that takes steps; what `training.step.run_schedule` reads of a run.

    Attributes:
        chunks: the model.
    """

    settings: Settings
    device: Device
    config: Any
    chunks: list[Any]

    def forward_backward(
        self, batches: Iterator[dict[str, torch.Tensor]], microbatches: int = 1
    ) -> list[torch.Tensor]:
        """A step's forward and backward passes through megatron-core's schedule; the losses."""
        from megatron_kanana.training.step import run_schedule

        run: Any = self  # of which the schedule reads what this has
        return run_schedule(run, [batches], microbatches, forward_only=False)


class SharedParameters:
    """The weights and gradients of one model, for others to use as theirs.

    Args:
        model: ours; keeps its weights, and gets `main_grad` of zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {_plain(name): p for name, p in model.named_parameters()}
        self.buffers = {_plain(name): b for name, b in model.named_buffers()}
        for parameter in self.parameters.values():
            gradient = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            _collect_in(parameter, gradient)

    def lend_to(self, model: nn.Module) -> None:
        """Let `model` compute with these weights and add to these gradients.

        Raises:
            KeyError: it has a parameter or an expert bias that these do not have.
            ValueError: its parameters have another dtype.
        """
        for name, parameter in model.named_parameters():
            weight, gradient = self._of(_plain(name))
            if weight.dtype != parameter.dtype:
                raise ValueError(f"{name} is {parameter.dtype}, the shared weights {weight.dtype}")
            parameter.data = weight
            _collect_in(parameter, gradient)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(self.buffers[_plain(name)])

    def zero_gradients(self) -> None:
        """Begin another sum of gradients."""
        for parameter in self.parameters.values():
            parameter.main_grad.zero_()  # type: ignore[attr-defined]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the sums, by our names of the parameters."""
        return {name: p.main_grad.clone() for name, p in self.parameters.items()}  # type: ignore[attr-defined]

    def _of(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if expert := _EXPERT.match(name):
            prefix, local, projection, number = expert.groups()
            stack = self.parameters[f"{prefix}.{_STACKS[projection]}"]
            index = int(local or number)
            return stack.data[index], stack.main_grad[index]  # type: ignore[attr-defined]
        for fused, own in _FUSED_NORMS.items():
            if name.endswith(fused):
                name = name.removesuffix(fused) + own
        parameter = self.parameters[name]
        return parameter.data, parameter.main_grad  # type: ignore[attr-defined]


def _plain(name: str) -> str:
    """A parameter's name without the wrappers that mixed precision puts around a model."""
    return name.removeprefix("module.")


def _collect_in(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """What megatron-core's data parallelism does with a parameter on one process."""
    parameter.main_grad = gradient  # type: ignore[attr-defined]
    parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    parameter.register_post_accumulate_grad_hook(_collect)


def _collect(parameter: torch.Tensor) -> None:
    if parameter.grad is not None and not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def our_model(settings: Settings, device: Device) -> Contender:
    """Ours, with weights drawn from the seed."""
    from megatron_kanana.optimizer.build import add_weight_gradients_in_place
    from megatron_kanana.training.run import build_chunks

    config, chunks = build_chunks(settings, device)
    add_weight_gradients_in_place(chunks)
    return Contender(settings, device, config, chunks)


def megatron_contender(settings: Settings, device: Device, **changes: Any) -> Contender:
    """megatron-core's own modules; `changes` to its configuration, such as `fp8="e4m3"`."""
    config, model = megatron_model(settings, device, **changes)
    return Contender(settings, device, config, [model])
