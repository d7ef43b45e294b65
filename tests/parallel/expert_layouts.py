"""Layers of experts over several processes beside a plain one: results, gradients, what travels.

Argument: JSON, a list of [port for the processes to meet at, backend, overrides of settings]. Also
compares the checkpoint's form of the experts with that of megatron-core's SequentialMLP. The last
line that the first process prints is JSON, a list of what it found.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_kanana import device
from megatron_kanana.config import detect_environment, load_settings

CONFIG_DIR = "tests/configs"
SLOTS = 3
TOKENS = (5, 0, 17, 9)  # of each process
Tensors = list[torch.Tensor]


def main(jobs: list[tuple[int, str, list[str]]]) -> None:
    """Look at each layout."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the layout before
    results = []
    for port, backend, overrides in jobs:
        os.environ["MASTER_PORT"] = str(port)
        environment = detect_environment()
        words = ["experiment=small", "device=cpu", *overrides]
        settings = load_settings(words, environment, CONFIG_DIR, with_files=False)
        where = device.prepare_device(settings, environment)
        device.initialize_process_groups(settings, where)
        results.append(look_at(settings, where, backend))
        device.destroy_process_groups()
    if environment.rank == 0:
        print(json.dumps(results))


def look_at(settings: Any, where: Any, backend: str) -> dict[str, Any]:
    """Everything about one layout, over all its processes."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_kanana.model.experts import GroupedExperts
    from megatron_kanana.model.megatron_config import transformer_config

    model_parallel_cuda_manual_seed(settings.seed)
    config, groups = transformer_config(settings, where), get_default_pg_collection()
    number = config.num_moe_experts // groups.ep.size()
    experts = GroupedExperts(number, config, backend=backend, pg_collection=groups)
    whole = whole_weights(config)
    with torch.no_grad():
        for parameter, weight in zip((experts.gate_up, experts.down), whole, strict=True):
            parameter.copy_(own_part(weight, groups, is_gate_up=parameter is experts.gate_up))
    found: dict[str, Any] = {"stored alike": stored_as_sequential(experts, config, groups)}
    for name in ("random", "few experts", "one expert"):
        of_case = compare(name, experts, whole, config, groups, backend)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, of_case)
        found[name] = {
            "errors": [max(errors) for errors in zip(*(e for e, _, _ in everywhere), strict=True)],
            "rows": sum(rows for _, rows, _ in everywhere),
            "expected rows": sum(rows for _, _, rows in everywhere),
        }
    return found


def whole_weights(config: Any) -> Tensors:
    """gate_up [experts, 2N, D] and down [experts, D, N] of all experts, the same everywhere."""
    dice = torch.Generator().manual_seed(7)
    hidden, width = config.hidden_size, config.moe_ffn_hidden_size
    shapes = [(2 * width, hidden), (hidden, width)]
    return [torch.randn(config.num_moe_experts, *shape, generator=dice) / 8 for shape in shapes]


def own_part(whole: torch.Tensor, groups: Any, *, is_gate_up: bool) -> torch.Tensor:
    """This process's experts, and of each its part of gate and up, or of down."""
    own: torch.Tensor = whole.chunk(groups.ep.size())[groups.ep.rank()]
    parts, part = groups.expt_tp.size(), groups.expt_tp.rank()
    if is_gate_up:
        return torch.cat([half.chunk(parts, 1)[part] for half in own.chunk(2, 1)], 1)
    of_down: torch.Tensor = own.chunk(parts, 2)[part]
    return of_down


def stored_as_sequential(experts: Any, config: Any, groups: Any) -> bool:
    """Whether the checkpoint's parts are those of a SequentialMLP of the same weights, all told."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    number = experts.num_local_experts
    sequential = SequentialMLP(number, config, submodules, pg_collection=groups)
    with torch.no_grad():
        for index, expert in enumerate(sequential.local_experts):
            expert.linear_fc1.weight.copy_(experts.gate_up[index])
            expert.linear_fc2.weight.copy_(experts.down[index])
    ours, theirs = (
        parts(each.sharded_state_dict("mlp.experts.")) for each in (experts, sequential)
    )
    merged = experts.sharded_state_dict("mlp.experts.")["mlp.experts.gate_up"]
    same = torch.equal(merged.merge_fn([part.data for part in merged.build()]), experts.gate_up)
    return bool(
        same
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[place], theirs[place]) for place in ours)
    )


def parts(state: dict[str, Any]) -> dict[Any, torch.Tensor]:
    """Data of the parts by everything that says where they lie."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_kanana.model.initialization import shards

    tensors: list[ShardedTensor] = [each for entry in state.values() for each in shards(entry)]
    return {
        (
            *(each.key, each.global_shape, each.global_offset, each.local_shape),
            *(each.axis_fragmentations, each.replica_id, each.prepend_axis_num, each.dtype),
        ): each.data
        for each in tensors
    }


def compare(
    case: str, experts: Any, whole: Tensors, config: Any, groups: Any, backend: str
) -> tuple[list[float], int, int]:
    """Errors relative to the plain ones, rows sent, and rows that had to be sent."""
    from megatron_kanana.model.dispatcher import token_dispatcher

    hidden_states, weights, chosen, gradient = tokens_of(case, config)
    number = experts.num_local_experts
    dispatcher = token_dispatcher("alltoall", number, config, groups, backend)
    sent: list[int] = []
    for parameter in experts.parameters():
        parameter.grad = None
    with counting(sent):
        tokens, probs = dispatcher.dispatch_preprocess(hidden_states[:, None], chosen, weights)
        tokens, probs = dispatcher.token_dispatch(tokens, probs)
        out, _ = experts(*dispatcher.dispatch_postprocess(tokens, probs))
        out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
        out = dispatcher.combine_postprocess(out)[:, 0]
        rows = sent[0] if sent else 0
        of_inputs = torch.autograd.grad(
            out, [hidden_states, weights, *experts.parameters()], gradient
        )
    ours = [out, *of_inputs[:2], *(summed(each, groups.expt_dp) for each in of_inputs[2:])]
    *plain, gate_up, down = plain_layer(hidden_states, weights, chosen, gradient, whole)
    for each in (gate_up, down):
        dist.all_reduce(each)
    gate_up, down = (own_part(each, groups, is_gate_up=each is gate_up) for each in (gate_up, down))
    errors = [
        float((a - b).norm() / b.norm().clamp(min=1e-12)) if b.numel() else 0.0
        for a, b in zip(ours, [*plain, gate_up, down], strict=True)
    ]
    places = chosen // number
    expected = sum(len(set(row)) for row in places.tolist()) if groups.ep.size() > 1 else 0
    return errors, rows, expected


def tokens_of(case: str, config: Any) -> tuple[torch.Tensor, ...]:
    """Hidden states, weights, experts, and a gradient, of this process."""
    rank = dist.get_rank()
    dice = torch.Generator().manual_seed(rank)
    tokens, all_experts = TOKENS[rank], config.num_moe_experts
    order = torch.rand(tokens, all_experts, generator=dice).argsort(1)
    if case == "few experts":
        order = torch.rand(tokens, SLOTS, generator=dice).argsort(1)  # half of them and more empty
    chosen = order[:, : 1 if case == "one expert" else SLOTS].int()
    if case == "one expert":
        chosen = torch.full_like(chosen, all_experts - 1)
    hidden_states = torch.randn(tokens, config.hidden_size, generator=dice).requires_grad_()
    weights = torch.rand(chosen.shape, generator=dice).requires_grad_()
    gradient = torch.randn(tokens, config.hidden_size, generator=dice)
    return hidden_states, weights, chosen, gradient


def plain_layer(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gradient: torch.Tensor,
    whole: Tensors,
) -> Tensors:
    """Output, and gradients of hidden states, weights and all experts', in float64."""
    inputs = [each.detach().double().requires_grad_() for each in (hidden_states, weights, *whole)]
    tokens, shares, gate_up, down = inputs
    out = tokens * 0
    for slot in range(chosen.shape[1]):
        of_slot = chosen[:, slot].long()
        gate, up = torch.einsum("td,tnd->tn", tokens, gate_up[of_slot]).chunk(2, 1)
        result = torch.einsum("tn,tdn->td", F.silu(gate) * up, down[of_slot])
        out = out + shares[:, slot, None] * result
    return [out, *torch.autograd.grad(out, inputs, gradient.double())]


def summed(gradient: torch.Tensor, group: Any) -> torch.Tensor:
    """Over the processes that hold the same experts."""
    result = gradient.clone()
    dist.all_reduce(result, group=group)
    return result


@contextlib.contextmanager
def counting(sent: list[int]) -> Iterator[None]:
    """Note the rows of each all-to-all."""
    original = dist.all_to_all_single

    def count(output: torch.Tensor, rows: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(len(rows))
        return original(output, rows, *arguments, **options)

    vars(dist)["all_to_all_single"] = count
    try:
        yield
    finally:
        vars(dist)["all_to_all_single"] = original


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
