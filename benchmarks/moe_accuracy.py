"""Errors of routing and experts, ours and megatron-core's with Transformer Engine, against float64.

python -m benchmarks.moe_accuracy --name moe_accuracy_h100

All are given the same router logits, so that they choose alike. An error is of a whole tensor: root
of the mean square, and largest, both over the root of the mean square of the exact tensor. Told are
means over `--draws` random weights and inputs; what is larger than megatron-core's by more than
chance, `error_draws.py` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from .card import reason, write_card
from .error_draws import Compared, Errors, compared, summary
from .megatron_model import CUTLASS
from .moe_cases import LOADS, Case, Inputs, Weights, random_inputs, random_weights, routing
from .moe_megatron import MegatronExperts, start_megatron_core
from .moe_peers import give_main_grads

OURS, MEGATRON = "ours", "megatron-core + TE"
TENSORS = (
    "output",
    "gradient of hidden states",
    "gradient of logits",
    "gradient of gate and up",
    "gradient of down",
)
LAYER = Case("30b layer", 4096, shared_width=0)
WIDE = Case("155b widths", 4096, 4096, 1536, experts=8, experts_per_token=2, shared_width=0)
CASES = {
    **{loads: dataclasses.replace(LAYER, loads=loads) for loads in LOADS},
    "all tokens to one expert": dataclasses.replace(LAYER, experts_per_token=1, loads=LOADS[3]),
    "1 token": dataclasses.replace(LAYER, tokens=1),
    "0 tokens": dataclasses.replace(LAYER, tokens=0),
    "8 experts of 155b": WIDE,
}
Results = dict[str, torch.Tensor]


def exact(
    case: Case, weights: Weights, inputs: Inputs, logits_TX: torch.Tensor
) -> tuple[Results, torch.Tensor]:
    """Output and gradients in float64, expert by expert; and the experts of the tokens."""
    hidden_states, logits = (
        tensor.detach().double().requires_grad_() for tensor in (inputs.hidden_states_TD, logits_TX)
    )
    weights_TK, experts_TK = routing(logits, inputs.expert_bias_X.double(), case)
    leaves, out = [], torch.zeros_like(hidden_states)
    for expert in range(case.experts):
        gate_up, down = (
            tensor[expert].double().requires_grad_()
            for tensor in (weights.gate_up_E2ND, weights.down_EDN)
        )
        tokens, slots = (experts_TK == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[tokens] @ gate_up.T).chunk(2, dim=1)
        rows = (F.silu(gate) * up) @ down.T * weights_TK[tokens, slots][:, None]
        out = out.index_add(0, tokens, rows)
        leaves += [gate_up, down]
    gradients = torch.autograd.grad(
        out, [hidden_states, logits, *leaves], inputs.grad_out_TD.double()
    )
    found = (
        out.detach(),
        *gradients[:2],
        torch.stack(gradients[2::2]),
        torch.stack(gradients[3::2]),
    )
    return dict(zip(TENSORS, found, strict=True)), experts_TK


def ours(case: Case, weights: Weights, inputs: Inputs, logits_TX: torch.Tensor) -> Results:
    """What this project's operations compute."""
    from megatron_kanana.kernels.moe import permutation_of, route, routed_experts

    layer = torch.nn.ParameterList([weights.gate_up_E2ND, weights.down_EDN])
    give_main_grads(layer)
    hidden_states_TD, logits_TX = _leaves(inputs, logits_TX)
    weights_TK, experts_TK = route(
        logits_TX,
        inputs.expert_bias_X,
        num_experts_per_token=case.experts_per_token,
        scaling_factor=case.scaling_factor,
        backend="csrc",
    )
    permutation = permutation_of(experts_TK, case.experts, inputs.rows, backend="csrc")
    out_TD = routed_experts(hidden_states_TD, weights_TK, permutation, *layer, backend="csrc")
    out_TD.backward(inputs.grad_out_TD)
    gradients = [getattr(parameter, "main_grad") for parameter in layer.parameters()]  # noqa: B009
    return _results(out_TD, hidden_states_TD, logits_TX, *gradients)


def megatron(case: Case, weights: Weights, inputs: Inputs, logits_TX: torch.Tensor) -> Results:
    """What megatron-core's fused router, permutation and TEGroupedMLP compute."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    start_megatron_core()
    _, experts_TK = routing(logits_TX, inputs.expert_bias_X, case)
    routed = dataclasses.replace(
        inputs, weights_TK=torch.zeros_like(experts_TK, dtype=torch.float32), experts_TK=experts_TK
    )
    layer = MegatronExperts(case, weights, routed)
    give_main_grads(layer)
    hidden_states_TD, logits_TX = _leaves(inputs, logits_TX)
    probabilities_TE, chosen_TE = topk_routing_with_score_function(
        logits_TX,
        case.experts_per_token,
        scaling_factor=case.scaling_factor,
        score_function="sigmoid",
        expert_bias=inputs.expert_bias_X,
        fused=True,
    )
    out_TD = layer.compute(hidden_states_TD, probabilities_TE, chosen_TE)
    out_TD.backward(inputs.grad_out_TD)
    gradients = [
        torch.stack([getattr(linear, f"weight{e}").main_grad for e in range(case.experts)])
        for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2)
    ]
    return _results(out_TD, hidden_states_TD, logits_TX, *gradients)


def _leaves(inputs: Inputs, logits_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        inputs.hidden_states_TD.detach().requires_grad_(),
        logits_TX.detach().requires_grad_(),
    )


def _results(out: torch.Tensor, *leaves_and_gradients: torch.Tensor) -> Results:
    hidden_states, logits, gate_up, down = leaves_and_gradients
    assert hidden_states.grad is not None and logits.grad is not None
    found = (out.detach(), hidden_states.grad, logits.grad, gate_up, down)
    return dict(zip(TENSORS, found, strict=True))


def errors(found: Results, right: Results) -> dict[str, float]:
    """By tensor and kind of error, as the head of this file defines them."""
    measured = {}
    for name, value in found.items():
        largest, rms = 0.0, 0.0
        if value.numel():
            size = float(right[name].square().mean().sqrt())
            size = size if size > 1e-12 else 1.0  # a gradient of zero: its error as it is
            difference = value.double().sub_(right[name])
            largest = float(difference.abs().max()) / size
            rms = float(difference.square_().mean().sqrt()) / size
        measured[f"{name}, rms error"] = rms
        measured[f"{name}, largest error"] = largest
    return measured


CONTENDERS: dict[str, Callable[[Case, Weights, Inputs, torch.Tensor], Results]] = {
    OURS: ours,
    MEGATRON: megatron,
}


def compare(name: str, case: Case, draws: int) -> tuple[list[Compared], list[str]]:
    """Errors of ours beside megatron-core's, and why one was not run."""
    measured: list[Errors] = []
    notes: list[str] = []
    failed: set[str] = set()
    same, others = True, 0
    for draw in range(draws):
        weights = random_weights(case, seed=2 * draw)
        inputs = random_inputs(case, weights, seed=2 * draw + 1)
        logits_TX = inputs.hidden_states_TD.detach().float() @ weights.router_XD.float().T
        right, experts_TK = exact(case, weights, inputs, logits_TX)
        measured.append({})
        for contender, compute in CONTENDERS.items():
            if contender in failed:
                continue
            try:
                found = compute(case, weights, inputs, logits_TX)
            except Exception as error:  # whatever one raises, the other runs
                failed.add(contender)
                notes.append(f"not run: {contender}, {name}: {reason(error)}")
                print(notes[-1], flush=True)
                continue
            measured[-1][contender] = errors(found, right)
            if contender == OURS:
                again = compute(case, weights, inputs, logits_TX)
                same &= all(torch.equal(found[tensor], again[tensor]) for tensor in TENSORS)
            text = "  ".join(f"{value:9.3e}" for value in measured[-1][contender].values())
            print(f"{name:34s} {contender:20s} {text}", flush=True)
        _, chosen_TK = routing(logits_TX, inputs.expert_bias_X, case)
        others += int((chosen_TK.sort(1).values != experts_TK.sort(1).values).any(1).sum())
    notes.append(f"{name}: bits of a second run are {'the same' if same else 'DIFFERENT'}")
    if others:
        notes.append(f"{name}: fp32 chooses other experts for {others} tokens")
    return compared(name, measured, OURS), notes


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="write benchmarks/results/NAME.json")
    parser.add_argument("--output", type=Path, help="folder of the card instead")
    parser.add_argument("--cutlass", action="store_true", help="TE's CUTLASS grouped GEMM")
    parser.add_argument("--draws", type=int, default=8, help="random inputs of a case")
    arguments = parser.parse_args()
    os.environ[CUTLASS] = "1" if arguments.cutlass else "0"
    results: list[Compared] = []
    notes: list[str] = []
    for name, case in CASES.items():
        new_results, new_notes = compare(name, case, arguments.draws)
        results += new_results
        notes += new_notes
        torch.cuda.empty_cache()
    notes = [*summary(results), *notes]
    print("\n".join(notes))
    if arguments.name:
        folder = {"results_dir": arguments.output} if arguments.output else {}
        rows = [result.row for result in results]
        print(write_card(arguments.name, rows, notes=notes, **folder))


if __name__ == "__main__":
    main()
