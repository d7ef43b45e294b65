"""csrc's experts in fp8 on a Hopper GPU against float64 of the same quantised numbers:

python -m pytest --noconftest tests/kernels/test_fp8_experts_sm90.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_kanana.kernels.moe.common_rows import CommonRows, QuantizedRows, quantize_rows
from megatron_kanana.kernels.moe.fp8 import (
    Fp8Choices,
    QuantizedWeights,
    gated_mlp_fp8,
    quantize_weights,
    routed_experts_fp8,
)

from .moe_reference import LOADS, Inputs, Sizes
from .test_moe_sm90 import (
    COUNTS,
    NAMES,
    cuda_inputs,
    float64_results,
    inputs_with_counts,
    no_synchronisation,
    permutation,
    with_main_grad,
)

pytestmark = pytest.mark.gpu

BLOCK = 128
LARGEST_E4M3 = 448.0
CHOICES = pytest.mark.parametrize(
    "choices",
    [
        Fp8Choices(kept_activations=kept, weight_gradients=weight_gradients)
        for weight_gradients in (False, True)
        for kept in (False, True)
    ],
    ids=["", "kept", "weight_gradients", "kept_and_weight_gradients"],
)
IN_BF16 = Fp8Choices()
# Hopper's tensor cores keep some 14 bits of a sum of fp8 products, so that one number in thirty of
# what is quantised after it falls on the other side of a rounding.
RMS_ERROR = 0.03
# Where a result is of a token or two, such numbers weigh more: gradients of six routing weights are
# up to 0.039 away when sums in float64 are cut to 14 bits, and one in thirty draws passes 0.03.
RMS_ERROR_OF_FEW = 0.06
FEW_TOKENS = 2
# Beside what the same numbers give unquantised: a rounding is 0.026, and gate and up that are kept
# in fp8 are two more.
RMS_ERROR_OF_FP8 = {False: 0.08, True: 0.1}
SCALE_OF_ZEROS = 2.0**-40  # of a whole row


def round_to_fp8(
    values: torch.Tensor, largest: torch.Tensor, of_zeros: float = 1.0
) -> torch.Tensor:
    """float64 values -> the nearest that e4m3 with the scale of this largest value has."""
    scale = scale_of(largest, of_zeros)
    return (values.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def scale_of(largest: torch.Tensor, of_zeros: float = 1.0) -> torch.Tensor:
    """fp32 scale with which the largest value is the format's."""
    return torch.where(largest > 0, largest.double() / LARGEST_E4M3, of_zeros).float()


def fp8_rows(values: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
    """Rows in blocks of 128 numbers; the largest of a block is that of `of`, else of `values`."""
    blocks = values.unflatten(-1, (-1, BLOCK))
    largest = (values if of is None else of).unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
    return round_to_fp8(blocks, largest).flatten(-2)


def fp8_whole_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with one scale each, and these, [rows, 1]."""
    largest = values.abs().amax(-1, keepdim=True)
    scales = scale_of(largest, SCALE_OF_ZEROS).double()
    return round_to_fp8(values, largest, SCALE_OF_ZEROS), scales


def fp8_tiles(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """An expert's rows in tiles of 128 x 128, the last one with what is left of them."""
    tiles = [
        round_to_fp8(rows.unflatten(1, (-1, BLOCK)), largest.view(1, -1, 1)).flatten(1)
        for rows, largest in (
            (rows, exact.unflatten(1, (-1, BLOCK)).abs().amax((0, 2)))
            for rows, exact in zip(values.split(BLOCK), of.split(BLOCK), strict=True)
            if len(rows)
        )
    ]
    return torch.cat(tiles) if tiles else values


def fp8_weights(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, columns] in blocks of 128 x 128."""
    rows, columns = matrix.shape
    blocks = matrix.double().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return round_to_fp8(blocks, blocks.abs().amax((1, 3), keepdim=True)).view(rows, columns)


def kept(pre_activation: torch.Tensor, *, in_fp8: bool) -> torch.Tensor:
    """What the backward pass finds of it."""
    return fp8_rows(pre_activation) if in_fp8 else pre_activation.bfloat16().double()


def expected_results(inputs: Inputs, choices: Fp8Choices = IN_BF16) -> dict[str, torch.Tensor]:
    """Output and gradients by name in float64, with the roundings that fp8 and bf16 make."""
    hidden_states = fp8_rows(inputs.hidden_states.double())
    whole_rows = choices.weight_gradients
    met_in, met_out = inputs.hidden_states.double(), inputs.grad_out.double()
    factors_in = factors_out = torch.ones_like(met_in[:, :1])
    if whole_rows:
        met_in, factors_in = fp8_whole_rows(met_in)
        met_out, factors_out = fp8_whole_rows(met_out)
    grad_out = met_out if whole_rows else fp8_rows(met_out)
    out, grad_hidden_states = torch.zeros_like(hidden_states), torch.zeros_like(hidden_states)
    grad_weights = torch.zeros_like(inputs.weights, dtype=torch.float64)
    grad_gate_ups, grad_downs = [], []
    for expert in range(len(inputs.down)):
        gate_up, down = fp8_weights(inputs.gate_up[expert]), fp8_weights(inputs.down[expert])
        tokens, slots = (inputs.chosen == expert).nonzero(as_tuple=True)
        weights = inputs.weights.double()[tokens, slots][:, None]
        pre_activation = hidden_states[tokens] @ gate_up.T
        gate, up = pre_activation.chunk(2, dim=1)
        rows = fp8_rows(gate * gate.sigmoid() * up) @ down.T
        out = out.index_add(0, tokens, rows.bfloat16().double() * weights)

        gate, up = kept(pre_activation, in_fp8=choices.kept_activations).chunk(2, dim=1)
        sigmoid, grad_activation = gate.sigmoid(), grad_out[tokens] @ down
        activation = gate * sigmoid * up
        grad_weights[tokens, slots] = (grad_activation * activation).sum(1)
        # Multiplied by the scales of the rows they will meet, gradients and activation are rounded.
        factor_in, factor_out = factors_in[tokens], factors_out[tokens]
        grad_gate = weights * grad_activation * up * sigmoid * (1 + gate * (1 - sigmoid))
        exact = torch.cat([grad_gate, weights * grad_activation * gate * sigmoid], 1) * factor_in
        grad_pre_activation = exact.bfloat16().double()
        rows = fp8_rows(grad_pre_activation, exact) / factor_in @ gate_up
        grad_hidden_states = grad_hidden_states.index_add(0, tokens, rows.bfloat16().double())
        weighted = (exact_activation := weights * activation * factor_out).bfloat16().double()
        if whole_rows:
            grad_pre_activation = fp8_tiles(grad_pre_activation, exact)
            weighted = fp8_tiles(weighted, exact_activation)
        grad_gate_ups.append(grad_pre_activation.T @ (met_in / factors_in)[tokens])
        grad_downs.append((met_out / factors_out)[tokens].T @ weighted)
    found = (out, grad_hidden_states, grad_weights)
    stacked = torch.stack(grad_gate_ups), torch.stack(grad_downs)
    return dict(zip(NAMES, (*found, *stacked), strict=True))


def results(
    inputs: Inputs, choices: Fp8Choices = IN_BF16, *, sums_are_zero: bool = False
) -> dict[str, torch.Tensor]:
    """Output and gradients by name; those of the experts' weights in fp32."""
    hidden_states, weights = (
        tensor.detach().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights)
    )
    parameters = with_main_grad(inputs.gate_up), with_main_grad(inputs.down)
    copies = [quantize_weights(parameter) for parameter in parameters]
    out = routed_experts_fp8(
        hidden_states,
        weights,
        permutation(inputs),
        *parameters,
        *copies,
        choices=choices,
        sums_are_zero=sums_are_zero,
    )
    out.backward(inputs.grad_out)
    found = (out.detach(), hidden_states.grad, weights.grad, *(p.main_grad for p in parameters))
    return dict(zip(NAMES, found, strict=True))


def rms(tensor: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(tensor.double().square().mean().sqrt())


def compare(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], limit: float = RMS_ERROR
) -> None:
    """Every result within `limit` of the exact one's size."""
    for name, tensor in exact.items():
        if tensor.numel():
            error = rms(found[name] - tensor)
            assert error <= limit * rms(tensor), (name, error / rms(tensor))


def limit_of(inputs: Inputs) -> float:
    """Of a result's distance from float64 with the same roundings."""
    return RMS_ERROR_OF_FEW if len(inputs.hidden_states) <= FEW_TOKENS else RMS_ERROR


def check(inputs: Inputs, choices: Fp8Choices) -> None:
    """Output and gradients beside float64, with and without fp8's roundings."""
    found = results(inputs, choices)
    compare(found, expected_results(inputs, choices), limit_of(inputs))
    compare(found, float64_results(inputs), RMS_ERROR_OF_FP8[choices.kept_activations])


@CHOICES
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("hidden", "width"), [(128, 128), (256, 384)])
def test_loads(load: str, hidden: int, width: int, choices: Fp8Choices) -> None:
    check(cuda_inputs(Sizes(700, 4, 16, hidden, width), load, seed=1), choices)


@CHOICES
@pytest.mark.parametrize(("hidden", "width"), [(640, 256), (2048, 768), (4096, 1536)])
def test_sizes(hidden: int, width: int, choices: Fp8Choices) -> None:
    check(cuda_inputs(Sizes(450, 3, 8, hidden, width), "Zipf", seed=hidden), choices)


@CHOICES
@pytest.mark.parametrize("counts", [COUNTS, COUNTS[::-1]])
def test_rows_of_an_expert(counts: tuple[int, ...], choices: Fp8Choices) -> None:
    check(inputs_with_counts(counts, 384, 256), choices)


@CHOICES
@pytest.mark.parametrize("tokens", [0, 1, 2, 129])
def test_few_tokens(tokens: int, choices: Fp8Choices) -> None:
    check(cuda_inputs(Sizes(tokens, 6, 128, 128, 128), seed=tokens), choices)


@CHOICES
@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_blocks_of_very_different_sizes(magnitude: float, choices: Fp8Choices) -> None:
    inputs = cuda_inputs(Sizes(300, 2, 4, 256, 128))
    hidden_states = inputs.hidden_states.clone()
    hidden_states[::3, :128] *= magnitude
    hidden_states[1::3] = 0.0
    inputs = dataclasses.replace(inputs, hidden_states=hidden_states)
    found = results(inputs, choices)
    compare(found, expected_results(inputs, choices))


@CHOICES
def test_every_run_has_the_same_bits(choices: Fp8Choices) -> None:
    inputs = cuda_inputs(Sizes(3000, 6, 32, 512, 256), "Zipf")
    first = results(inputs, choices)
    for _ in range(4):
        again = results(inputs, choices)
        for name in NAMES:
            assert torch.equal(again[name], first[name]), name


def test_gradients_that_are_zero_so_far_need_not_be_read() -> None:
    inputs = inputs_with_counts(COUNTS, 384, 384)
    choices = Fp8Choices(weight_gradients=True)
    added, written = (results(inputs, choices, sums_are_zero=zero) for zero in (False, True))
    for name in NAMES:
        assert torch.equal(added[name], written[name]), name


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 640), (1536, 2048)])
def test_weights_are_rounded_to_the_nearest_in_both_orders(rows: int, columns: int) -> None:
    weights = torch.randn(3, rows, columns, device="cuda", dtype=torch.bfloat16)
    weights[1, :128, :128] = 0.0
    found: QuantizedWeights = quantize_weights(weights)
    scales = found.scales_ERC.double().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    numbers = found.data.double() * scales
    expected = torch.stack([fp8_weights(matrix) for matrix in weights])
    # A multiplication by the rounded inverse may go to the other neighbour of a division.
    differ = (numbers - expected).abs() > 1e-6 * expected.abs()
    assert float(differ.double().mean()) < 1e-3
    assert torch.equal(found.transposed.view(torch.uint8), found.data.view(torch.uint8).mT)


@CHOICES
def test_memory_kept_is_that_of_the_format(choices: Fp8Choices) -> None:
    tokens, chosen, width = 4096, 4, 512
    inputs = cuda_inputs(Sizes(tokens, chosen, 8, 256, width))
    hidden_states = inputs.hidden_states.detach().requires_grad_()
    parameters = with_main_grad(inputs.gate_up), with_main_grad(inputs.down)
    copies = [quantize_weights(parameter) for parameter in parameters]
    order = permutation(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = routed_experts_fp8(
        hidden_states, inputs.weights, order, *parameters, *copies, choices=choices
    )
    of_number = 1 + 4 / BLOCK if choices.kept_activations else 2
    expected = tokens * chosen * 2 * width * of_number + out.numel() * out.element_size()
    assert torch.cuda.memory_allocated() - before == pytest.approx(expected, rel=0.01)


@CHOICES
@pytest.mark.parametrize("tokens", [0, 1, 129, 1000])
@pytest.mark.parametrize(("hidden", "width"), [(128, 256), (2048, 768)])
def test_shared_experts_are_an_expert_of_all_tokens(
    tokens: int, hidden: int, width: int, choices: Fp8Choices
) -> None:
    inputs = cuda_inputs(Sizes(tokens, 1, 1, hidden, width), seed=tokens)
    inputs = dataclasses.replace(inputs, weights=torch.ones_like(inputs.weights))
    hidden_states = inputs.hidden_states.detach().requires_grad_()
    parameters = with_main_grad(inputs.gate_up[0]), with_main_grad(inputs.down[0])
    copies = [quantize_weights(parameter[None]) for parameter in parameters]
    out = gated_mlp_fp8(hidden_states, *parameters, *copies, choices=choices)
    out.backward(inputs.grad_out)
    expected = expected_results(inputs, choices)
    expected.pop("weights")
    found = (out.detach(), hidden_states.grad, *(p.main_grad[None] for p in parameters))
    compare(dict(zip(expected, found, strict=True)), expected, limit_of(inputs))


@pytest.mark.parametrize("tokens", [65, 1000, 1200])
def test_gradients_of_shared_experts_have_the_same_bits_where_blocks_share_rows(
    tokens: int,
) -> None:
    """There are more tiles of this gradient than multiprocessors, and it is zero so far."""
    inputs = cuda_inputs(Sizes(tokens, 1, 1, 2048, 1536), seed=tokens)
    inputs = dataclasses.replace(inputs, weights=torch.ones_like(inputs.weights))
    choices = Fp8Choices(weight_gradients=True)

    def gradients() -> dict[str, torch.Tensor]:
        parameters = with_main_grad(inputs.gate_up[0]), with_main_grad(inputs.down[0])
        copies = [quantize_weights(parameter[None]) for parameter in parameters]
        hidden_states = inputs.hidden_states.detach().requires_grad_()
        out = gated_mlp_fp8(
            hidden_states, *parameters, *copies, choices=choices, sums_are_zero=True
        )
        out.backward(inputs.grad_out)
        return dict(zip(NAMES[-2:], (p.main_grad[None] for p in parameters), strict=True))

    found = gradients()
    exact = expected_results(inputs, choices)
    compare(found, {name: exact[name] for name in found})
    for _ in range(4):
        again = gradients()
        assert all(torch.equal(again[name], found[name]) for name in found)


@CHOICES
@pytest.mark.parametrize("tokens", [0, 1, 129, 1000])
def test_rows_in_common_with_shared_experts_give_the_same_bits(
    tokens: int, choices: Fp8Choices
) -> None:
    inputs = cuda_inputs(Sizes(tokens, 4, 16, 256, 384), "Zipf", seed=tokens)
    calls: list[bool] = []

    def counted(rows: torch.Tensor, whole: bool) -> QuantizedRows:
        calls.append(whole)
        return quantize_rows(rows, whole)

    apart, together = (
        results_with_shared_experts(inputs, choices, common)
        for common in (None, CommonRows(counted))
    )
    for name in apart:
        assert torch.equal(apart[name], together[name]), name
    assert calls == ([False, True, True] if choices.weight_gradients else [False, False])


def results_with_shared_experts(
    inputs: Inputs, choices: Fp8Choices, common: CommonRows | None
) -> dict[str, torch.Tensor]:
    """As `results`, of all experts and of the first one beside as a shared one."""
    hidden_states, weights = (
        tensor.detach().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights)
    )
    parameters = with_main_grad(inputs.gate_up), with_main_grad(inputs.down)
    of_shared = with_main_grad(inputs.gate_up[0]), with_main_grad(inputs.down[0])
    copies = [quantize_weights(parameter) for parameter in parameters]
    copies_of_shared = [quantize_weights(parameter[None]) for parameter in of_shared]
    options: Any = {"choices": choices, "common_rows": common}
    shared = gated_mlp_fp8(hidden_states, *of_shared, *copies_of_shared, **options)
    order = permutation(inputs)
    out = routed_experts_fp8(hidden_states, weights, order, *parameters, *copies, **options)
    out = out + shared
    out.backward(inputs.grad_out)
    found = (out.detach(), hidden_states.grad, weights.grad, *(p.main_grad for p in parameters))
    names = (*NAMES, "shared gate_up", "shared down")
    return dict(zip(names, (*found, *(p.main_grad for p in of_shared)), strict=True))


@pytest.mark.parametrize("whole", [False, True])
def test_rows_are_rounded_to_the_nearest(whole: bool) -> None:
    rows = torch.randn(300, 640, device="cuda", dtype=torch.bfloat16)
    rows[::3, :BLOCK] *= 1e4
    rows[7] = 0.0
    data, scales = quantize_rows(rows, whole)
    numbers = (data.double().unflatten(1, (-1, BLOCK)) * scales.double()[:, :, None]).flatten(1)
    expected = fp8_whole_rows(rows.double())[0] if whole else fp8_rows(rows.double())
    # A multiplication by the rounded inverse may go to the other neighbour of a division.
    differ = (numbers - expected).abs() > 1e-6 * expected.abs()
    assert float(differ.double().mean()) < 1e-3
    assert not whole or torch.equal(scales, scales[:, :1].expand_as(scales))


@pytest.mark.parametrize("width", [64, 192])
def test_rows_between_the_blocks_are_refused(width: int) -> None:
    rows = torch.zeros(4, width, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="width of rows must be a multiple of 128"):
        quantize_rows(rows, False)


def test_nothing_waits_for_the_gpu() -> None:
    inputs = cuda_inputs(Sizes(500, 4, 16, 128, 128), "Zipf")
    results(inputs)
    order = permutation(inputs)
    parameters = with_main_grad(inputs.gate_up), with_main_grad(inputs.down)
    with no_synchronisation():
        copies = [quantize_weights(parameter) for parameter in parameters]
        out = routed_experts_fp8(inputs.hidden_states, inputs.weights, order, *parameters, *copies)
        out.backward(inputs.grad_out)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("hidden", "width"), [(192, 128), (128, 64)])
def test_sizes_between_the_blocks_are_refused(hidden: int, width: int) -> None:
    inputs = cuda_inputs(Sizes(64, 2, 4, hidden, width))
    with pytest.raises(
        RuntimeError, match=r"precision.experts = fp8: .*; set precision.experts=bf16"
    ):
        quantize_weights(inputs.gate_up)
        quantize_weights(inputs.down)
