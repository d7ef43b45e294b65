"""What a layer of experts keeps and launches: bytes, peaks of memory, kernels and their times."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .moe_cases import Inputs
from .moe_peers import drop_gradients


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward pass, above weights and their gradients.

    Attributes:
        saved: distinct memory of the tensors that autograd saves in forward, the layer's input
            among them, parameters left out.
        after_forward: allocated after forward, less the output, plus the layer's input.
        peak: largest of forward and backward, with the layer's input and the output's gradient.
    """

    saved: int
    after_forward: int
    peak: int


@dataclass(frozen=True)
class Launch:
    """One kernel, copy or fill on the GPU.

    Attributes:
        direction: 'forward' or 'backward'.
    """

    direction: str
    name: str
    microseconds: float


def bytes_of(*tensors: torch.Tensor) -> int:
    """Their elements, views counted as if they were whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_memory(layer: nn.Module, inputs: Inputs) -> Memory:
    """Of a layer that has been warmed up."""
    given = bytes_of(inputs.hidden_states_TD)
    out, saved = _saved_bytes(layer, inputs)
    del out
    drop_gradients(inputs)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = layer(inputs)
    after_forward = torch.cuda.memory_allocated() - before - bytes_of(out) + given
    out.backward(inputs.grad_out_TD)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before + given + bytes_of(inputs.grad_out_TD)
    drop_gradients(inputs)
    return Memory(saved, after_forward, peak)


def _saved_bytes(layer: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, int]:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(inputs)
    return out, sum(storages.values())


def launches(layer: nn.Module, inputs: Inputs) -> list[Launch]:
    """Everything that one forward and backward pass runs on the GPU, in order."""
    outputs: list[torch.Tensor] = []
    forward = _device_events(lambda: outputs.append(layer(inputs)))
    backward = _device_events(lambda: outputs[0].backward(inputs.grad_out_TD))
    drop_gradients(inputs)
    return [
        Launch(direction, name, microseconds)
        for direction, events in (("forward", forward), ("backward", backward))
        for name, microseconds in events
    ]


def _device_events(function: Callable[[], object]) -> list[tuple[str, float]]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def kernel_table(found: list[Launch]) -> str:
    """Times by kernel, the longest first, in each direction."""
    lines = []
    for direction in ("forward", "backward"):
        by_name: dict[str, list[float]] = {}
        for launch in found:
            if launch.direction == direction:
                by_name.setdefault(launch.name, []).append(launch.microseconds)
        whole = sum(map(sum, by_name.values()))
        number = sum(map(len, by_name.values()))
        lines.append(f"{direction}: {number} launches, {whole:.0f} us")
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1])):
            lines.append(f"  {sum(times):9.1f} us {len(times):4d} x {name[:130]}")
    return "\n".join(lines)
