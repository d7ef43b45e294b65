"""What of a slice fits on a GPU, from few measured numbers."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from megatron_kanana.config import Settings
from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.device import Device
from megatron_kanana.planning.parameters import count_parameters

WEIGHT_BYTES = 6
"""bf16 weight and fp32 gradient."""
UPDATE_BYTES = 8
"""fp32 weight and momentum, which are sharded but for the experts."""
USABLE = 0.85
MOST_LAYERS = 10


def default_layers(model: ModelSettings, tokens: int, gpu_bytes: float) -> int:
    """Layers of a slice that fits alone with all its experts on one GPU, at most MOST_LAYERS."""
    for layers in range(MOST_LAYERS, 1, -1):
        model.num_layers = layers
        weights, _ = parameters_here(model, 1)
        if WEIGHT_BYTES * weights + activations(layers, tokens) < USABLE * gpu_bytes:
            return layers
    return 2


def activations(layers: int, tokens: int) -> float:
    """Bytes: megatron-core + TE keep 6.1 GiB for 4 layers and 8,192 tokens, and 11.7 for 10."""
    return tokens / 8192 * (2.4 + 0.93 * layers) * 2**30


def parameters_here(model: ModelSettings, processes: int) -> tuple[float, float]:
    """Parameters of a process, and how many of them are routed experts'."""
    expert = 3 * model.hidden_size * model.moe_ffn_hidden_size
    experts = (model.num_layers - model.num_dense_layers) * model.num_experts * expert
    total = count_parameters(model).total
    return total - experts + experts / processes, experts / processes


def fits(options: argparse.Namespace, settings: Settings, contenders: int, device: Device) -> bool:
    """Whether so many contenders fit beside each other."""
    if not device.is_cuda:
        return True
    here, _ = parameters_here(settings.model, dist.get_world_size())
    tokens = options.sequences * options.sequence_length
    needed = contenders * WEIGHT_BYTES * here + activations(settings.model.num_layers, tokens)
    return needed < USABLE * torch.cuda.get_device_properties(0).total_memory


def fits_update(options: argparse.Namespace, settings: Settings, device: Device) -> bool:
    """Whether ours fits with its optimizer, with the activations of one sequence."""
    if not device.is_cuda:
        return True
    processes = dist.get_world_size()
    here, experts = parameters_here(settings.model, processes)
    update = UPDATE_BYTES * (experts + (here - experts) / processes)
    needed = WEIGHT_BYTES * here + update
    needed += activations(settings.model.num_layers, options.sequence_length)
    return needed < USABLE * torch.cuda.get_device_properties(0).total_memory
