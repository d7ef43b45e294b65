"""The choice of experts, its gradient and the counts: both backends against float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from megatron_kanana.kernels.moe import count_tokens, route
from megatron_kanana.kernels.native import native_library_error

from .moe_reference import float64_route

assert native_library_error() is None

BACKENDS = ["csrc", "torch"]
# Tokens, experts, experts a token, groups, groups a token: the sizes of the tiny model, Kanana-2
# and DeepSeek, and some that fit no vector.
ROUTES = [
    (100, 16, 4, 1, 1),
    (70, 128, 6, 1, 1),
    (65, 256, 8, 8, 4),
    (33, 128, 8, 4, 4),
    (40, 21, 2, 7, 1),
    (31, 5, 5, 1, 1),
    (20, 6, 4, 6, 5),
    (64, 37, 1, 1, 1),
    (1, 1, 1, 1, 1),
    (0, 16, 4, 4, 2),
]


def check_route(backend: str, sizes: tuple[int, int, int, int, int], with_bias: bool) -> None:
    """Compare experts, weights and the logits' gradient for random logits."""
    tokens, experts, slots, groups, groups_per_token = sizes
    generator = torch.Generator().manual_seed(tokens)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).requires_grad_()
    bias = 0.3 * torch.randn(experts, generator=generator) if with_bias else None
    grad = torch.randn(tokens, slots, generator=generator)
    weights, chosen = route(
        logits,
        bias,
        num_experts_per_token=slots,
        num_groups=groups,
        groups_per_token=groups_per_token,
        scaling_factor=2.448,
        backend=backend,
    )
    (grad_logits,) = torch.autograd.grad(weights, logits, grad)
    expected, expected_chosen = float64_route(logits, bias, slots, groups, groups_per_token, 2.448)
    (expected_grad,) = torch.autograd.grad(expected, logits, grad.double())
    assert chosen.dtype == torch.int32 and torch.equal(chosen.long(), expected_chosen)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(grad_logits, expected_grad.float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", ROUTES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_weights_and_gradient_are_those_of_float64(
    backend: str, sizes: tuple[int, int, int, int, int], with_bias: bool
) -> None:
    check_route(backend, sizes, with_bias)


@pytest.mark.parametrize(("groups", "groups_per_token", "slots"), [(1, 1, 6), (8, 4, 8), (4, 1, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_is_that_of_megatron_core(
    backend: str, groups: int, groups_per_token: int, slots: int
) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    generator = torch.Generator().manual_seed(slots)
    logits = torch.randn(300, 64, generator=generator)
    bias = 0.1 * torch.randn(64, generator=generator)
    weights, chosen = route(
        logits,
        bias,
        num_experts_per_token=slots,
        num_groups=groups,
        groups_per_token=groups_per_token,
        scaling_factor=2.5,
        backend=backend,
    )
    dense = torch.zeros(300, 64).scatter(1, chosen.long(), weights)
    expected, routing_map = topk_routing_with_score_function(
        logits,
        slots,
        num_groups=groups if groups > 1 else None,
        group_topk=groups_per_token if groups > 1 else None,
        scaling_factor=2.5,
        score_function="sigmoid",
        expert_bias=bias,
    )
    assert torch.equal(dense > 0, routing_map)
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equals_the_lower_number_is_chosen(backend: str) -> None:
    logits = torch.zeros(1, 40)
    logits[0, [7, 21, 35]] = 1.0
    _, chosen = route(logits, None, num_experts_per_token=5, backend=backend)
    assert chosen.tolist() == [[7, 21, 35, 0, 1]]
    # Groups of four: two of them are worth the same, the others less.
    logits = torch.zeros(1, 16)
    logits[0, [13, 14, 5, 6]] = 1.0
    logits[0, 0] = 0.5
    options: dict[str, Any] = {"num_groups": 4, "groups_per_token": 1, "backend": backend}
    _, chosen = route(logits, None, num_experts_per_token=3, **options)
    assert chosen.tolist() == [[5, 6, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_and_extreme_logits_choose_different_experts_and_show_in_the_weights(
    backend: str,
) -> None:
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    logits[0] = math.nan
    logits[1, 3] = math.nan
    logits[2] = -math.inf
    logits[3, :3] = torch.tensor([1e4, -1e4, math.inf])
    logits[4, :18] = -1e30
    weights, chosen = route(logits, None, num_experts_per_token=4, backend=backend)
    for row in chosen.tolist():
        assert len(set(row)) == 4 and all(0 <= expert < 20 for expert in row)
    assert weights[0].isnan().all() and weights[1].isnan().any()
    assert weights[2:].isfinite().all()
    assert {0, 2} <= set(chosen[3].tolist()) and {18, 19} <= set(chosen[4].tolist())
    torch.testing.assert_close(weights[3:].sum(1), torch.ones(3))


def test_views_give_the_same_bits_as_copies_on_every_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(24, 200, generator=generator).T.requires_grad_()
    grad = torch.randn(1, 4, generator=generator).expand(200, 4)
    options: dict[str, Any] = {"num_experts_per_token": 4, "backend": "csrc"}
    copies = views.detach().contiguous().requires_grad_()
    expected, expected_chosen = route(copies, None, **options)
    (expected_grad,) = torch.autograd.grad(expected, copies, grad.contiguous())
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            weights, chosen = route(views, None, **options)
            (grad_logits,) = torch.autograd.grad(weights, views, grad)
            assert torch.equal(weights, expected) and torch.equal(chosen, expected_chosen)
            assert torch.equal(grad_logits, expected_grad)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_added_without_padding(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(50, 9, generator=generator).topk(3).indices.int()
    padding = torch.rand(50, generator=generator) < 0.4
    counts = torch.arange(9.0)
    expected = counts + torch.bincount(chosen.flatten(), minlength=9)
    expected += torch.bincount(chosen[~padding].flatten(), minlength=9)
    count_tokens(chosen, counts, backend=backend)
    count_tokens(chosen, counts, padding, backend=backend)
    count_tokens(chosen[:0], counts, padding[:0], backend=backend)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_compiles_as_one_graph(backend: str) -> None:
    logits = torch.randn(12, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    bias = torch.linspace(-0.1, 0.1, 16)

    def loss(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        weights, chosen = route(logits, bias, num_experts_per_token=4, backend=backend)
        count_tokens(chosen, counts, backend=backend)
        return (weights * torch.arange(4)).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    counts, compiled_counts = torch.zeros(16), torch.zeros(16)
    (expected,) = torch.autograd.grad(loss(logits, counts), logits)
    (grad,) = torch.autograd.grad(compiled(logits, compiled_counts), logits)
    assert torch.equal(grad, expected) and torch.equal(compiled_counts, counts)
    assert counts.sum() == 48


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logits": torch.zeros(8)}, "logits must have shape [tokens, experts], got [8]"),
    ({"logits": torch.zeros(4, 8).double()}, "logits must be Float, got Double"),
    ({"logits": torch.zeros(8, 4).T}, "logits must be contiguous, got strides [1, 4]"),
    ({"expert_bias": torch.zeros(7)}, "expert_bias must have shape [8], got [7]"),
    ({"expert_bias": torch.zeros(8).bfloat16()}, "expert_bias must be Float, got BFloat16"),
    ({"slots": 0}, "at least one expert a token, got 0"),
    ({"slots": 5}, "num_experts_per_token must be at most the 4 experts of a token's groups"),
    ({"groups": 3}, "num_groups must divide the number of experts, got 3 for 8"),
    ({"groups_per_token": 5}, "groups_per_token must be from 1 to num_groups = 4, got 5"),
    ({"scaling_factor": 0.0}, "scaling_factor must be positive and finite, got 0"),
    ({"scaling_factor": math.inf}, "scaling_factor must be positive and finite, got inf"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_inputs_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(4, 8),
        "expert_bias": None,
        "slots": 2,
        "groups": 4,
        "groups_per_token": 2,
        "scaling_factor": 1.0,
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.megatron_kanana.moe_route(*(arguments | wrong).values())


def test_numbers_and_buffers_of_the_other_operations_are_checked_too() -> None:
    operations = torch.ops.megatron_kanana
    chosen = torch.tensor([[0, 3]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="experts must have numbers from 0 to 2, got 3 at"):
        operations.moe_count(chosen, None, torch.zeros(3))
    with pytest.raises(RuntimeError, match="counts must be Float, got Long"):
        operations.moe_count(chosen, None, torch.zeros(4, dtype=torch.long))
    with pytest.raises(RuntimeError, match=re.escape("padding must have shape [1], got [2]")):
        operations.moe_count(chosen, torch.zeros(2, dtype=torch.bool), torch.zeros(4))
    with pytest.raises(RuntimeError, match="experts must have numbers from 0 to 2, got 3 at"):
        operations.moe_route_backward(torch.zeros(1, 2), torch.zeros(1, 3), chosen, 1.0)
    with pytest.raises(RuntimeError, match=re.escape("grad_weights must have shape [1, 2]")):
        operations.moe_route_backward(torch.zeros(1, 1), torch.zeros(1, 4), chosen, 1.0)
