"""A layer of experts, twice forward and backward; on CUDA the second time must not wait for it.

Argument: 'cpu' or 'cuda'. Prints, as JSON, what the layer's output and gradients are.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_kanana import device
from megatron_kanana.config import Environment, load_settings

CONFIG_DIR = "tests/configs"
SIZES = ("model.hidden_size=128", "model.moe_ffn_hidden_size=64", "model.num_experts=16")


def main(name: str) -> None:
    """Build the layer and run it."""
    environment = Environment(cuda_device_count=torch.cuda.device_count())
    words = ["experiment=small", f"device={name}", "precision=bf16", *SIZES]
    settings = load_settings(words, environment, CONFIG_DIR, with_files=False)
    where = device.prepare_device(settings, environment)
    backend = "nccl" if name == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=HashStore())
    device.process.lay_over_processes(settings, with_gloo_groups=False)
    print(json.dumps(look_at(settings, where, name)))
    device.destroy_process_groups()


def look_at(settings: Any, where: Any, name: str) -> dict[str, Any]:
    """The second pass."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module

    from megatron_kanana.model.layer_spec import expert_layer_spec
    from megatron_kanana.model.megatron_config import transformer_config

    model_parallel_cuda_manual_seed(settings.seed)
    torch.manual_seed(0)
    config = transformer_config(settings, where)
    layer = build_module(expert_layer_spec("alltoall", "csrc"), config=config)
    layer.set_layer_number(1)
    layer.to(where.torch_device).bfloat16()
    shape = (64, 2, config.hidden_size)
    inputs = [torch.randn(shape, device=where.torch_device).bfloat16() for _ in range(2)]
    for turn, hidden_states in enumerate(inputs):
        layer.zero_grad()
        hidden_states.requires_grad_()
        if name == "cuda" and turn == 1:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        output, _ = layer(hidden_states)
        output.backward(torch.ones_like(output))
        if name == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    gradients = [hidden_states.grad, *(each.grad for each in layer.parameters())]
    return {
        "shape": list(output.shape),
        "finite": all(bool(each.isfinite().all()) for each in [output, *gradients]),
        "nonzero": all(bool(each.any()) for each in [output, *gradients]),
        "counted": float(layer.router.local_tokens_per_expert.sum()),
    }


if __name__ == "__main__":
    main(sys.argv[1])
