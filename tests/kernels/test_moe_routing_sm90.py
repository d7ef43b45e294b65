"""csrc's routing and permutation on a Hopper GPU. Needs torch and this package alone:

python -m pytest --noconftest tests/kernels/test_moe_routing_sm90.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_kanana.kernels.moe import count_tokens, permutation_of, route

from .moe_reference import LOADS, random_experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("experts", "slots", "groups", "groups_per_token"),
    [
        *((experts, 1, 1, 1) for experts in (1, 8, 512)),
        *((experts, 6, 1, 1) for experts in (6, 8, 64, 128, 256, 512)),
        *((experts, 8, 8, 4) for experts in (16, 64, 256, 512)),
        (128, 32, 2, 1),
        (96, 6, 3, 2),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_choice_is_the_reference_s(
    experts: int, slots: int, groups: int, groups_per_token: int, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(experts)
    # Steps of 1/16 make many equal scores, and others far enough apart for any sigmoid.
    logits = torch.randint(-48, 48, (1111, experts), generator=generator).cuda() / 16
    bias = torch.randint(-4, 4, (experts,), generator=generator).cuda() / 8 if with_bias else None
    options: dict[str, Any] = {
        "num_experts_per_token": slots,
        "num_groups": groups,
        "groups_per_token": groups_per_token,
        "scaling_factor": 2.448,
    }
    weights, chosen = route(logits, bias, backend="csrc", **options)
    expected_weights, expected = route(logits, bias, backend="torch", **options)
    assert chosen.dtype == torch.int32 and torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("slots", [1, 6, 32])
def test_weights_and_their_gradients(slots: int) -> None:
    logits = torch.randn(2000, 128, device="cuda")
    bias = torch.randn(128, device="cuda") / 10
    grad = torch.randn(2000, slots, device="cuda")
    found = {}
    for name, dtype in (("csrc", torch.float32), ("torch", torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        weights, chosen = route(
            leaf,
            bias.to(dtype),
            num_experts_per_token=slots,
            scaling_factor=2.448,
            backend=name,
        )
        (gradient,) = torch.autograd.grad(weights, leaf, grad.to(dtype))
        found[name] = (weights, chosen, gradient)
    same = (found["csrc"][1] == found["torch"][1]).all(1)
    assert float(same.float().mean()) > 0.99  # in fp32 a near tie may go the other way
    for value, right in zip(found["csrc"][::2], found["torch"][::2], strict=True):
        torch.testing.assert_close(value[same].double(), right[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_routing_of_few_tokens(tokens: int) -> None:
    logits = torch.randn(tokens, 128, device="cuda", requires_grad=True)
    weights, chosen = route(logits, None, num_experts_per_token=6, backend="csrc")
    weights.sum().backward()
    assert weights.shape == chosen.shape == (tokens, 6)
    assert logits.grad is not None and logits.grad.shape == logits.shape


@pytest.mark.parametrize("padded", [False, True])
def test_counts_are_added(padded: bool) -> None:
    logits = torch.randn(5000, 64, device="cuda")
    _, chosen = route(logits, None, num_experts_per_token=6, backend="csrc")
    padding = torch.rand(5000, device="cuda") < 0.3 if padded else None
    counts = torch.arange(64, device="cuda", dtype=torch.float32)
    expected = counts.clone()
    count_tokens(chosen, counts, padding, backend="csrc")
    count_tokens(chosen, expected, padding, backend="torch")
    assert torch.equal(counts, expected)


def test_experts_of_many_sequences_are_counted_apart() -> None:
    # As the balance loss does: more numbers than a layer may have experts.
    chosen = torch.randint(4096, (3000, 6), device="cuda", dtype=torch.int32)
    counts, expected = torch.zeros(2, 4096, device="cuda").unbind()
    count_tokens(chosen, counts, backend="csrc")
    count_tokens(chosen, expected, backend="torch")
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 8), (1, 8), (7, 128), (1000, 8), (20000, 128)])
def test_permutations_are_the_reference_s(load: str, tokens: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    chosen = random_experts(load, tokens, 6, experts, generator)
    rows = int((chosen >= 0).sum())
    found, expected = (
        permutation_of(chosen.cuda(), experts, rows, backend=backend)
        for backend in ("csrc", "torch")
    )
    for name, value in vars(found).items():
        right = getattr(expected, name)
        assert value.dtype == torch.int32 and torch.equal(value, right), name
