"""Runs models on the CPU and prints, as JSON, the bytes that autograd keeps of a forward pass.

Of each case also the most memory that the forward and the backward pass take beside what was there.
With tensor parallelism one process of several is run alone, with collectives that do nothing: its
numbers are nonsense and its shapes are real.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.device import prepare_device
from megatron_kanana.device.process import destroy_process_groups, lay_over_processes
from tests.expert_losses import forget_losses

CONFIG_DIR = "tests/configs"


def main(cases: dict[str, list[str]]) -> None:
    """Print, for each case, what its overrides make a model keep."""
    print(json.dumps({name: run(overrides) for name, overrides in cases.items()}))


def run(overrides: list[str]) -> dict[str, int]:
    """Bytes 'saved' and 'peak' of one case."""
    words = ["experiment=small", "device=cpu", "precision=bf16", *overrides]
    tensor = [word for word in words if word.startswith("parallel.tensor_parallel_size=")]
    world = int(tensor[-1].partition("=")[2]) if tensor else 1
    environment = Environment(world_size=world, local_world_size=world)
    settings = load_settings(words, environment, CONFIG_DIR, with_files=False)
    where = prepare_device(settings, Environment())

    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    lay_over_processes(settings, with_gloo_groups=False)
    model_parallel_cuda_manual_seed(settings.seed)
    forget_losses()  # of a model with another number of layers
    torch.manual_seed(0)
    try:
        return measure(settings, where)
    finally:
        destroy_process_groups()


def measure(settings: Settings, where: Any) -> dict[str, int]:
    """Build the model, run a microbatch through it, and count."""
    from megatron.core.transformer.module import Float16Module

    from megatron_kanana.kernels.backend import Backends
    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.megatron_config import transformer_config

    config = transformer_config(settings, where)
    # SDPA and csrc run on a CPU, too; what they keep there is what they keep on a GPU.
    backend = "sdpa" if settings.kernels.backend == "auto" else settings.kernels.backend
    of_experts = "torch" if settings.kernels.moe_backend == "auto" else settings.kernels.moe_backend
    backends = Backends(backend, of_experts, loss="csrc")
    model = Float16Module(config, gpt_model(settings, config, backends)).train()
    if settings.precision.fp8 != "none":  # which a CPU leaves out
        left_out = settings.precision.bf16_weights
        quantise_inputs(model, settings.parallel.recompute_parts, left_out)
    # As data parallelism has it: the output layer adds to its sums, and no gradient stays.
    output = model.module.output_layer.weight
    output.main_grad, output.grad_added_to_main_grad = torch.zeros_like(output).float(), False
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in owned:
            saved[place] = tensor
        return tensor

    shape = (settings.schedule.micro_batch_size, settings.data.sequence_length)
    tokens = torch.randint(0, settings.model.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, shared_experts_seen_by(keep):
        model(tokens, positions, None, labels=tokens, loss_mask=torch.ones(shape))
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    saved.clear()
    return {"saved": kept, "peak": peak_of(model, tokens, positions)}


class LinearOfQuantised(torch.autograd.Function):
    """A linear layer that keeps its input as Transformer Engine's do in blockwise fp8."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """inputs @ weight.T, in their own format."""
        scales = inputs.new_empty(inputs.numel() // 128, dtype=torch.float32)
        ctx.save_for_backward(inputs.to(torch.float8_e4m3fn), scales, weight)
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both, from the quantised input."""
        quantised, _, weight = ctx.saved_tensors
        inputs = quantised.to(grad.dtype).flatten(0, -2)
        return grad @ weight, grad.flatten(0, -2).t() @ inputs


def quantise_inputs(model: torch.nn.Module, again: list[str], left_out: list[str]) -> None:
    """Have projections keep quantised inputs, but where megatron-core has them keep the original.

    That is the output projection, which shares attention's output, and with norms computed again
    the down-projections and the dense feed-forward's first layer, whose input is gone meanwhile
    (`set_save_original_input`).

    Args:
        again: `parallel.recompute_parts`.
        left_out: `precision.bf16_weights`.
    """
    kinds = {
        "linear_q_proj": "query",
        "linear_q_up_proj": "query_up",
        "linear_kv_up_proj": "key_value_up",
        "mlp.linear_fc2": "down",
    }
    if "norms" not in again:
        kinds["linear_q_down_proj"] = "query_down"
        kinds["linear_kv_down_proj"] = "key_value_down"
        kinds["mlp.linear_fc1"] = "gate_up"
    names = tuple(name for name, kind in kinds.items() if kind not in left_out)
    for name, module in model.named_modules():
        if name.endswith(names):
            module.forward = partial(forward_of_quantised, module)


def forward_of_quantised(module: Any, inputs: torch.Tensor, *_: Any, **__: Any) -> Any:
    """What megatron-core's linear layers return: the output, and no bias."""
    return LinearOfQuantised.apply(inputs, module.weight), None


def drop_gradient(parameter: torch.Tensor) -> None:
    """As data parallelism does when it has added it."""
    parameter.grad = None


@contextlib.contextmanager
def shared_experts_seen_by(keep: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Hand `keep` also what the shared experts keep with hooks of their own, which hide it."""
    from megatron_kanana.model import shared_experts

    module = vars(shared_experts)
    kept_in_parts = module["_kept_in_parts"]

    def seen(*arguments: Any) -> Any:
        own = kept_in_parts(*arguments)

        def pack(tensor: torch.Tensor) -> Any:
            packed = own.pack_hook(tensor)
            keep(packed if isinstance(packed, torch.Tensor) else packed[1])
            return packed

        return torch.autograd.graph.saved_tensors_hooks(pack, own.unpack_hook)

    module["_kept_in_parts"] = seen
    try:
        yield
    finally:
        module["_kept_in_parts"] = kept_in_parts


def peak_of(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> int:
    """Most bytes that were allocated at once during both passes, gradients of weights included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        mask = torch.ones(tokens.shape)
        model(tokens, positions, None, labels=tokens, loss_mask=mask).sum().backward()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
