"""Layers of experts in fp8 on a CPU, by a stand-in: what they quantise, and what comes of it.

Prints, as JSON, a list for each case of what was found without and with rows in common.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.utils.checkpoint import checkpoint

from megatron_kanana import device
from megatron_kanana.config import Environment, load_settings
from megatron_kanana.kernels.moe.fp8 import Fp8Choices

from .fp8_stand_in import Operations, stand_in

CONFIG_DIR = "tests/configs"
SIZES = ("model.hidden_size=32", "model.moe_ffn_hidden_size=16", "model.num_experts=8")
Case = Callable[[Any, Operations, list[torch.Tensor]], list[torch.Tensor]]


def one_pass(layer: Any, _: Operations, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Forward and backward."""
    output, _ = layer(inputs[0])
    output.backward(inputs[1].detach())
    return [output]


def recomputed(layer: Any, _: Operations, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Forward twice, the second time in the backward pass."""
    output, _ = checkpoint(layer, inputs[0], use_reentrant=True)
    output.backward(inputs[1].detach())
    return [output]


def microbatches_in_flight(
    layer: Any, _: Operations, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """As on a stage of a pipeline: others' forward passes come before one's backward pass."""
    first, _ = layer(inputs[0])
    second, _ = layer(inputs[1])
    first.backward(inputs[1].detach())
    third, _ = layer(inputs[0])
    second.backward(inputs[0].detach())
    third.backward(inputs[1].detach())
    return [first, second, third]


def without_gradients(layer: Any, _: Operations, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """As in evaluation."""
    layer.eval()
    with torch.no_grad():
        output, _ = layer(inputs[0])
    return [output]


def after_an_error(
    layer: Any, operations: Operations, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """A forward pass ends between its two; then the same tensor comes with other numbers."""
    operations.fails = True
    with suppress(RuntimeError):
        layer(inputs[0])
    assert operations.held == 0
    with torch.no_grad():
        inputs[0].mul_(2.0)
    return one_pass(layer, operations, inputs)


def twice_backward(layer: Any, _: Operations, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Through one graph, with another gradient."""
    output, _ = layer(inputs[0])
    output.backward(inputs[1].detach(), retain_graph=True)
    output.backward(inputs[0].detach())
    return [output]


def expanded_gradient(layer: Any, _: Operations, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of one number, so that each of the two copies it."""
    output, _ = layer(inputs[0])
    output.sum().backward()
    return [output]


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        *(one_pass, recomputed, microbatches_in_flight, without_gradients, after_an_error),
        *(twice_backward, expanded_gradient),
    )
}


def main() -> None:
    """Look at every case."""
    environment = Environment(cuda_device_count=0)
    words = ["experiment=small", "device=cpu", *SIZES]
    settings = load_settings(words, environment, CONFIG_DIR, with_files=False)
    where = device.prepare_device(settings, environment)
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    device.process.lay_over_processes(settings, with_gloo_groups=False)
    found = {
        f"{name}, {'fp8' if weight_gradients else 'bf16'}": [
            look_at(settings, where, case, weight_gradients, takes_rows)
            for takes_rows in (False, True)
        ]
        for name, case in CASES.items()
        for weight_gradients in (False, True)
    }
    print(json.dumps(found))
    device.destroy_process_groups()


def look_at(
    settings: Any, where: Any, case: Case, weight_gradients: bool, takes_rows: bool
) -> dict[str, Any]:
    """Quantisations of a new layer, results, and what is held in the end."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module

    from megatron_kanana.model.layer_spec import expert_layer_spec
    from megatron_kanana.model.megatron_config import transformer_config

    model_parallel_cuda_manual_seed(settings.seed)
    torch.manual_seed(0)
    config = transformer_config(settings, where)
    choices = Fp8Choices(kept_activations=True, weight_gradients=weight_gradients)
    with stand_in(takes_rows=takes_rows) as operations:
        layer = build_module(expert_layer_spec("alltoall", "torch", fp8=choices), config=config)
        layer.set_layer_number(1)
        shape = (16, 2, config.hidden_size)
        inputs = [torch.randn(shape).requires_grad_() for _ in range(2)]
        storages = [weakref.ref(each.untyped_storage()) for each in inputs]
        outputs = case(layer, operations, inputs)
    tensors = [*outputs, *(each.grad for each in (*inputs, *layer.parameters()))]
    results = [None if each is None else each.detach().flatten().tolist() for each in tensors]
    held = operations.held
    del inputs, outputs, tensors
    return {
        "quantised": operations.quantized,
        "results": results,
        "held": held + sum(storage() is not None for storage in storages),
    }


if __name__ == "__main__":
    main()
