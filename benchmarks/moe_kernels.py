"""The kernels that route, sort and move rows, alone, beside a copy and Transformer Engine's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .card import Row, reason
from .interleaved import interleaved_ms
from .moe_cases import Case, Inputs, Weights
from .moe_memory import launches
from .moe_peers import CONTENDERS, OURS_ROUTED, built

COMBINE = "combine"  # part of the names of our kernels that sum up each token's rows
PROFILED = 5  # layers whose combining kernels are timed
COPY = "copy"
MUST, GOAL = 0.8, 0.9  # of the rate of a copy


@dataclass(frozen=True)
class Movement:
    """A kernel that moves rows or decides where they go.

    Attributes:
        bytes: that it has to read and write, each once.
        prepare: makes what is timed.
    """

    name: str
    bytes: int
    prepare: Callable[[], Callable[[], Any]]


def data_movement(
    case: Case, weights: Weights, inputs: Inputs, *, rounds: int, repeats: int
) -> tuple[list[Row], list[str]]:
    """Rows of ours and of Transformer Engine's, each with its share of the rate of a copy.

    The copy is of as many bytes as all rows hold. Notes tell what did not run, and whether the
    kernels that combine rows are fast enough.
    """
    movements = [*_ours(case, weights, inputs), *_transformer_engine(case, weights, inputs)]
    functions, notes = _warmed_up(case, movements)
    times = interleaved_ms(functions, rounds, repeats)
    found = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    sizes = {movement.name: movement.bytes for movement in movements}
    row_bytes, token_bytes, slot_bytes = _bytes(case, inputs)
    for name, microseconds in _combines(case, weights, inputs).items():
        found[name] = microseconds
        sizes[name] = row_bytes + token_bytes + (2 if "forward" in name else 1) * slot_bytes
    copy_rate = sizes[COPY] / found[COPY]  # bytes a microsecond: MB/s
    rows = [Row(f"{case.label}: copy of {row_bytes / 2**20:.0f} MiB", "GB/s", copy_rate / 1e3)]
    for name, microseconds in found.items():
        if name == COPY:
            continue
        rate = sizes[name] / microseconds
        text = (
            f"{case.label}: {name}: {microseconds:.1f} us, {rate / 1e3:.0f} GB/s,"
            f" {rate / copy_rate:.1%} of a copy's {copy_rate / 1e3:.0f}"
        )
        if name.startswith(COMBINE):
            enough = [rate / copy_rate >= limit for limit in (GOAL, MUST)]
            text += f": {'goal' if enough[0] else 'must' if enough[1] else 'BELOW'}"
            notes.append(text)
        print(text, flush=True)
        rows.append(Row(f"{case.label}: {name}", "us", microseconds))
        rows.append(
            Row(
                f"{case.label}: {name}",
                "GB/s",
                rate / 1e3,
                COPY,
                copy_rate / 1e3,
                rate / copy_rate,
            )
        )
    return rows, notes


def _bytes(case: Case, inputs: Inputs) -> tuple[int, int, int]:
    """Of all rows, of all tokens in bf16, and of one number of 4 bytes a slot."""
    return (
        2 * inputs.rows * case.hidden_size,
        2 * inputs.tokens * case.hidden_size,
        4 * inputs.tokens * case.experts_per_token,
    )


def _warmed_up(
    case: Case, movements: list[Movement]
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    functions: dict[str, Callable[[], object]] = {}
    not_run = []
    for movement in movements:
        try:
            function = movement.prepare()
            for _ in range(3):
                function()
            torch.cuda.synchronize()
        except Exception as error:  # whatever one raises, the others run
            not_run.append(f"not run: {movement.name}, {case.label}: {reason(error)}")
            print(not_run[-1], flush=True)
            continue
        functions[movement.name] = function
    return functions, not_run


def _ours(case: Case, weights: Weights, inputs: Inputs) -> list[Movement]:
    """The copy, and our operations."""
    row_bytes, _, slot_bytes = _bytes(case, inputs)
    operations = torch.ops.megatron_kanana
    logits_TX = _logits(weights, inputs)
    logit_bytes = 4 * logits_TX.numel()
    options = (case.experts_per_token, 1, 1, case.scaling_factor)

    def routed() -> Any:
        return operations.moe_route(logits_TX, inputs.expert_bias_X, *options)

    def copy() -> Callable[[], Any]:
        source = torch.empty(inputs.rows, case.hidden_size, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def route_backward() -> Callable[[], Any]:
        weights_TK, experts_TK = routed()
        return lambda: operations.moe_route_backward(
            weights_TK, logits_TX, experts_TK, case.scaling_factor
        )

    def count() -> Callable[[], Any]:
        _, experts_TK = routed()
        counts_X = torch.zeros_like(inputs.expert_bias_X)
        return lambda: operations.moe_count(experts_TK, None, counts_X)

    def permutation() -> Callable[[], Any]:
        experts_TK = routed()[1] if inputs.experts_TK is None else inputs.experts_TK
        return lambda: operations.moe_permutation(experts_TK, case.local_experts, inputs.rows)

    found = [
        Movement(COPY, 2 * row_bytes, copy),
        Movement("ours, permutation", 2 * slot_bytes + 4 * inputs.rows, permutation),
    ]
    if case.processes == 1:
        found += [
            Movement("ours, route", logit_bytes + 2 * slot_bytes, lambda: routed),
            Movement("ours, route backward", 2 * logit_bytes + 2 * slot_bytes, route_backward),
            Movement("ours, count", slot_bytes, count),
        ]
    return found


def _logits(weights: Weights, inputs: Inputs) -> torch.Tensor:
    return (inputs.hidden_states_TD.detach() @ weights.router_XD.T).float()


def _transformer_engine(case: Case, weights: Weights, inputs: Inputs) -> list[Movement]:
    """Its kernels of routing and permutation, as megatron-core calls them."""
    row_bytes, token_bytes, _ = _bytes(case, inputs)
    hidden_states_TD, logits_TX = inputs.hidden_states_TD.detach(), _logits(weights, inputs)

    def top_k() -> Callable[[], Any]:
        from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

        return lambda: topk_routing_with_score_function(
            logits_TX,
            case.experts_per_token,
            scaling_factor=case.scaling_factor,
            score_function="sigmoid",
            expert_bias=inputs.expert_bias_X,
            fused=True,
        )

    def permute() -> Callable[[], Any]:
        from megatron.core.transformer.moe.moe_utils import permute

        from .moe_megatron import dense_routing

        if inputs.weights_TK is None or inputs.experts_TK is None:
            probabilities, chosen = top_k()()
        else:
            probabilities, chosen = dense_routing(
                inputs.weights_TK.detach(), inputs.experts_TK, case.local_experts
            )
        options = {"probs": probabilities, "num_out_tokens": inputs.rows, "fused": True}
        return lambda: permute(hidden_states_TD, chosen, **options)

    def unpermute() -> Callable[[], Any]:
        from megatron.core.transformer.moe.moe_utils import unpermute

        rows_MD, _, order = permute()()
        return lambda: unpermute(rows_MD, order, hidden_states_TD.shape, fused=True)

    name, choices = "Transformer Engine", inputs.tokens * case.experts
    found = [
        Movement(f"{name}, permute", row_bytes + token_bytes, permute),
        Movement(f"{name}, unpermute", row_bytes + token_bytes, unpermute),
    ]
    if case.processes == 1:  # logits and probabilities in fp32, choices as bytes
        found.append(Movement(f"{name}, top-k", 9 * choices, top_k))
    return found


def _combines(case: Case, weights: Weights, inputs: Inputs) -> dict[str, float]:
    """Microseconds of our combining kernels in a layer, forward and backward."""
    times: dict[str, list[float]] = {}
    try:
        layer = built(CONTENDERS[OURS_ROUTED], case, weights, inputs)
        for _ in range(PROFILED + 1):
            runs: dict[str, float] = {}
            for launch in launches(layer, inputs):
                if COMBINE in launch.name.lower():
                    name = f"{COMBINE}, {launch.direction}"
                    runs[name] = runs.get(name, 0.0) + launch.microseconds
            for name, microseconds in runs.items():
                times.setdefault(name, []).append(microseconds)
    except Exception as error:
        print(f"not run: combining kernels of {case.label}: {error}"[:400], flush=True)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
