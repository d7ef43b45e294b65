"""Routing and experts on a CPU beside megatron-core's SequentialMLP: speed and errors.

python -m benchmarks.moe_cpu --name moe_cpu

From router logits and hidden states to the weighted sum of the experts, in fp32, with interleaved
rounds. The backward pass ends with every weight's gradient added to its `main_grad`, as under
megatron-core's data parallelism. All layers have the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from megatron_kanana.device.patches import apply_patches
from megatron_kanana.kernels.moe import permutation_of, route, routed_experts
from megatron_kanana.kernels.native import load_native_operations

from .card import RESULTS_DIR, Row, write_card
from .interleaved_cpu import rows_in_turns
from .moe_peers import give_main_grads

OURS = "csrc"
PLAIN = "torch"
SEQUENTIAL = "SequentialMLP"
SCALING_FACTOR = 2.448


@dataclass(frozen=True)
class Case:
    """Sizes of one layer, and whether few experts are visited by most tokens."""

    name: str
    tokens: int
    experts: int
    experts_per_token: int
    hidden: int
    width: int
    zipf: bool = False

    def __str__(self) -> str:
        sizes = f"{self.tokens} tokens, {self.experts} experts, top-{self.experts_per_token}"
        load = "Zipf" if self.zipf else "uniform"
        return f"{self.name}: {sizes}, d {self.hidden}, n {self.width}, {load} load"


CASES = (
    Case("tiny", 4096, 16, 4, 128, 64),
    Case("tiny", 4096, 16, 4, 128, 64, zipf=True),
    Case("wider", 2048, 64, 6, 512, 256),
    Case("wider", 2048, 64, 6, 512, 256, zipf=True),
)


@dataclass
class Tensors:
    """Inputs and weights of one case; those of `inputs` want gradients."""

    logits_TX: torch.Tensor
    bias_X: torch.Tensor
    hidden_states_TD: torch.Tensor
    gate_up_X2ND: torch.Tensor
    down_XDN: torch.Tensor
    grad_out_TD: torch.Tensor

    @property
    def inputs(self) -> list[torch.Tensor]:
        """What the layers are differentiated by, besides their weights."""
        return [self.logits_TX, self.hidden_states_TD]


def random_tensors(case: Case) -> Tensors:
    """Normal; with a Zipf load, logits fall with the logarithm of an expert's number."""
    generator = torch.Generator().manual_seed(case.experts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    logits_TX = normal(case.tokens, case.experts)
    if case.zipf:
        logits_TX -= torch.arange(1, case.experts + 1).log()
    return Tensors(
        logits_TX.requires_grad_(),
        0.01 * normal(case.experts),
        normal(case.tokens, case.hidden).requires_grad_(),
        normal(case.experts, 2 * case.width, case.hidden) * case.hidden**-0.5,
        normal(case.experts, case.hidden, case.width) * case.width**-0.5,
        normal(case.tokens, case.hidden),
    )


class OurExperts(nn.Module):
    """This project's, by either backend."""

    def __init__(self, case: Case, tensors: Tensors, backend: str) -> None:
        super().__init__()
        self.case, self.bias_X, self.backend = case, tensors.bias_X, backend
        self.gate_up = nn.Parameter(tensors.gate_up_X2ND.clone())
        self.down = nn.Parameter(tensors.down_XDN.clone())

    def forward(self, logits_TX: torch.Tensor, hidden_states_TD: torch.Tensor) -> torch.Tensor:
        weights_TK, experts_TK = route(
            logits_TX,
            self.bias_X,
            num_experts_per_token=self.case.experts_per_token,
            scaling_factor=SCALING_FACTOR,
            backend=self.backend,
        )
        permutation = permutation_of(
            experts_TK, self.case.experts, experts_TK.numel(), backend=self.backend
        )
        return routed_experts(
            hidden_states_TD, weights_TK, permutation, self.gate_up, self.down, backend=self.backend
        )


class SequentialExperts(nn.Module):
    """megatron-core's routing, permutation and SequentialMLP, as its layer puts them together."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.moe.experts import SequentialMLP

        super().__init__()
        self.case, self.bias_X = case, tensors.bias_X
        config = TransformerConfig(
            num_layers=1,
            hidden_size=case.hidden,
            num_attention_heads=1,
            ffn_hidden_size=case.width,
            moe_ffn_hidden_size=case.width,
            num_moe_experts=case.experts,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            bias_activation_fusion=True,
            add_bias_linear=False,
            use_cpu_initialization=True,
        )
        experts = get_moe_module_spec(use_te=False, num_experts=case.experts).submodules.experts
        assert experts.module is SequentialMLP
        self.experts = SequentialMLP(
            case.experts,
            config,
            experts.submodules,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        with torch.no_grad():
            for number, expert in enumerate(self.experts.local_experts):
                expert.linear_fc1.weight.copy_(tensors.gate_up_X2ND[number])
                expert.linear_fc2.weight.copy_(tensors.down_XDN[number])

    def forward(self, logits_TX: torch.Tensor, hidden_states_TD: torch.Tensor) -> torch.Tensor:
        from megatron.core.transformer.moe.moe_utils import (
            permute,
            topk_routing_with_score_function,
            unpermute,
        )

        probabilities_TX, routing_map_TX = topk_routing_with_score_function(
            logits_TX,
            self.case.experts_per_token,
            scaling_factor=SCALING_FACTOR,
            score_function="sigmoid",
            expert_bias=self.bias_X,
        )
        rows_MD, probabilities_M, indices_M = permute(
            hidden_states_TD, routing_map_TX, probs=probabilities_TX
        )
        rows_MD, _ = self.experts(rows_MD, routing_map_TX.sum(0), probabilities_M)
        out_TD: torch.Tensor = unpermute(rows_MD, indices_M, hidden_states_TD.shape)
        return out_TD


def contenders(case: Case, tensors: Tensors) -> dict[str, nn.Module]:
    """The layers by name, with their fp32 gradients."""
    layers: dict[str, nn.Module] = {
        OURS: OurExperts(case, tensors, "csrc"),
        PLAIN: OurExperts(case, tensors, "torch"),
        SEQUENTIAL: SequentialExperts(case, tensors),
    }
    for layer in layers.values():
        give_main_grads(layer)
    return layers


def calls(layer: nn.Module, tensors: Tensors) -> dict[str, Callable[[], object]]:
    """What is timed, by direction."""

    def forward() -> None:
        with torch.no_grad():
            layer(*tensors.inputs)

    def forward_and_backward() -> None:
        layer(*tensors.inputs).backward(tensors.grad_out_TD)
        for tensor in tensors.inputs:
            tensor.grad = None

    return {"forward": forward, "forward + backward": forward_and_backward}


def time_case(case: Case, rounds: int) -> list[Row]:
    """One row for each direction and peer."""
    tensors = random_tensors(case)
    by_name = {name: calls(layer, tensors) for name, layer in contenders(case, tensors).items()}
    return rows_in_turns(str(case), OURS, by_name, rounds)


def results(layer: nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Output and gradients of the inputs."""
    out = layer(*tensors.inputs)
    grads = torch.autograd.grad(out, tensors.inputs, tensors.grad_out_TD.to(out.dtype))
    return {
        "output": out.detach(),
        "logits' gradient": grads[0],
        "hidden states' gradient": grads[1],
    }


def errors(case: Case) -> list[Row]:
    """Largest error against the plain backend in float64."""
    tensors = random_tensors(case)
    layers = contenders(case, tensors)
    doubles = Tensors(*(tensor.detach().double() for tensor in vars(tensors).values()))
    for tensor in doubles.inputs:
        tensor.requires_grad_()
    exact = results(OurExperts(case, doubles, "torch"), doubles)

    def largest(layer: nn.Module) -> dict[str, float]:
        found = results(layer, tensors)
        return {
            name: float((found[name].double() - tensor).abs().max())
            for name, tensor in exact.items()
        }

    own, peer = largest(layers[OURS]), largest(layers[SEQUENTIAL])
    return [
        Row(
            f"{case}: error of the {name}",
            "largest difference",
            own[name],
            SEQUENTIAL,
            peer[name],
            peer[name] / own[name],
        )
        for name in exact
    ]


def start_megatron_core() -> None:
    """One process of megatron-core on this CPU."""
    apply_patches("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def main() -> None:
    """Measure, print and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options: Any = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_native_operations()
    start_megatron_core()
    instructions = torch.ops.megatron_kanana.cpu_instruction_set()
    setting = f"{instructions}, {options.threads} threads"
    print(setting)
    rows = [row for case in CASES for row in time_case(case, options.rounds)] + errors(CASES[0])
    for row in rows:
        print(
            f"{row.name}: {row.ours:.4g} {row.unit}, {row.peer} {row.peer_value:.4g}, "
            f"ratio {row.ratio:.2f}"
        )
    write_card(options.name, rows, options.results_dir, notes=[setting])


if __name__ == "__main__":
    main()
