"""Routing and experts at small shapes, in bf16 and fp8, for compute-sanitizer to watch."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_kanana.kernels.moe import (
    count_tokens,
    gated_mlp,
    permutation_of,
    route,
    routed_experts,
)
from megatron_kanana.kernels.moe.common_rows import CommonRows
from megatron_kanana.kernels.moe.fp8 import (
    Fp8Choices,
    gated_mlp_fp8,
    quantize_weights,
    routed_experts_fp8,
)

from .moe_reference import Sizes, random_inputs

# tokens, slots, experts, hidden size, width; load
CASES = [
    (Sizes(150, 4, 8, 128, 64), "Zipf"),
    (Sizes(130, 2, 3, 192, 320), "elsewhere"),
    (Sizes(200, 6, 32, 64, 192), "half empty"),
    (Sizes(257, 1, 2, 256, 128), "one expert"),
    (Sizes(1, 6, 16, 64, 64), "uniform"),
    (Sizes(0, 2, 4, 64, 64), "uniform"),
]
FP8_CASES = [
    (Sizes(150, 4, 8, 128, 128), "Zipf"),
    (Sizes(257, 2, 3, 256, 384), "half empty"),
    (Sizes(1, 4, 8, 384, 128), "uniform"),
]


def main() -> None:
    """Run forward and backward of each case."""
    for sizes, load in CASES:
        inputs = random_inputs(sizes, load, dtype=torch.bfloat16)
        hidden_states, weights, gate_up, down = (
            tensor.cuda().requires_grad_()
            for tensor in (inputs.hidden_states, inputs.weights, inputs.gate_up, inputs.down)
        )
        grad_out, chosen = inputs.grad_out.cuda(), inputs.chosen.cuda()
        permutation = permutation_of(chosen, sizes.experts, inputs.rows, backend="csrc")
        out = routed_experts(hidden_states, weights, permutation, gate_up, down, backend="csrc")
        out = out + gated_mlp(hidden_states, gate_up[0], down[0], backend="csrc")
        out.backward(grad_out)
        logits = torch.randn(sizes.tokens, sizes.experts, device="cuda", requires_grad=True)
        bias, counts = torch.zeros(2, sizes.experts, device="cuda").unbind()
        for groups, kept in ((1, 1), (2, 1)):
            if sizes.experts % groups or sizes.experts // groups * kept < sizes.slots:
                continue
            found, experts = route(
                logits,
                bias,
                num_experts_per_token=sizes.slots,
                num_groups=groups,
                groups_per_token=kept,
                backend="csrc",
            )
            padding = torch.arange(sizes.tokens, device="cuda") % 5 == 0
            count_tokens(experts, counts, padding, backend="csrc")
            found.sum().backward()
        torch.cuda.synchronize()
        assert out.isfinite().all()
    for (sizes, load), *in_fp8 in itertools.product(FP8_CASES, (False, True), (False, True)):
        run_in_fp8(sizes, load, Fp8Choices(*in_fp8))


def run_in_fp8(sizes: Sizes, load: str, choices: Fp8Choices) -> None:
    """Forward and backward of the experts in fp8."""
    inputs = random_inputs(sizes, load, dtype=torch.bfloat16)
    hidden_states, weights, gate_up, down = (
        tensor.cuda().requires_grad_()
        for tensor in (inputs.hidden_states, inputs.weights, inputs.gate_up, inputs.down)
    )
    permutation = permutation_of(inputs.chosen.cuda(), sizes.experts, inputs.rows, backend="csrc")
    copies = [quantize_weights(weight) for weight in (gate_up, down)]
    copies_of_first = [quantize_weights(weight[:1]) for weight in (gate_up, down)]
    for common in (None, CommonRows()):
        options: Any = {"choices": choices, "common_rows": common}
        out = routed_experts_fp8(
            hidden_states, weights, permutation, gate_up, down, *copies, **options
        )
        out = out + gated_mlp_fp8(hidden_states, gate_up[0], down[0], *copies_of_first, **options)
        out.backward(inputs.grad_out.cuda())
    torch.cuda.synchronize()
    assert out.isfinite().all()


if __name__ == "__main__":
    main()
