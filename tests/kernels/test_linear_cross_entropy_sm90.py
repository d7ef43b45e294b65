"""csrc's losses on a Hopper GPU. Needs torch and this package alone, with products in fp8
Transformer Engine too:

python -m pytest --noconftest tests/kernels/test_linear_cross_entropy_sm90.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_kanana.kernels.linear_cross_entropy import compiled, linear_cross_entropy, plain
from megatron_kanana.kernels.linear_cross_entropy.fp8_products import GRADIENT_OF_ONE

from .fp8_loss_reference import assert_close, in_fp8, random_problem

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [1, 7, 8, 9, 4095, 4096, 4103, 128256])
@pytest.mark.parametrize("rows", [0, 1, 133])
def test_rows_are_the_reference_s(rows: int, words: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(words + rows)
    padded = -(-words // 8) * 8
    logits = (10 * torch.randn(rows, padded, generator=generator)).cuda().to(dtype)[:, :words]
    first_word = 100
    labels = torch.randint(0, words + 200, (rows,), generator=generator).cuda()
    weights = torch.rand(rows, generator=generator).cuda()
    expected = plain.statistics(logits, labels, first_word)
    found = compiled.statistics(logits, labels, first_word)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    right = logits.clone()
    plain.gradient_(right, labels, first_word, expected, weights)
    compiled.gradient_(logits, labels, first_word, expected, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(logits, right, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row(bad: float) -> None:
    logits = torch.randn(4, 1000, device="cuda")
    logits[2, 700] = bad
    labels = torch.zeros(4, dtype=torch.long, device="cuda")
    largest, sums, of_label = compiled.statistics(logits, labels, 0)
    losses = sums.log() - (of_label - largest)
    assert losses[2].isnan() and losses.isfinite().sum() == 3


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [100, 3000])
def test_losses_and_gradients_are_those_of_float64(
    tokens: int, dtype: torch.dtype, known: bool
) -> None:
    hidden, words = 256, 5003
    generator = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(tokens, hidden, generator=generator).cuda().to(dtype)
    weight: Any = torch.nn.Parameter(
        (torch.randn(words, hidden, generator=generator) / 16).cuda().to(dtype)
    )
    weight.main_grad = torch.zeros(words, hidden, device="cuda")
    weight.grad_added_to_main_grad = False
    labels = torch.randint(words, (tokens,), generator=generator).cuda()
    weights = (torch.rand(tokens, generator=generator) < 0.7).float().cuda()
    right = [hidden_states.double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = F.cross_entropy(right[0] @ right[1].T, labels, reduction="none")
    (expected * weights * 0.37).sum().backward()
    hidden_states.requires_grad_()
    losses = linear_cross_entropy(
        hidden_states,
        weight,
        labels,
        weights if known else None,
        backend="csrc",
        chunk_bytes=700 * words * dtype.itemsize,
    )
    (losses * weights * 0.37).sum().backward()
    tolerance = 3e-3 if dtype == torch.float32 else 1e-2  # products may be taken in TF32
    for found, value in (
        (losses, expected),
        (hidden_states.grad, right[0].grad),
        (weight.main_grad, right[1].grad),
    ):
        assert found is not None and value is not None
        assert float((found.double() - value).norm() / value.norm()) < tolerance


def test_a_gradient_that_is_no_multiple_of_the_weights_becomes_nan() -> None:
    hidden_states = torch.randn(3000, 64, device="cuda")
    weight = torch.randn(500, 64, device="cuda", requires_grad=True)
    labels = torch.randint(500, (3000,), device="cuda")
    weights = torch.rand(3000, device="cuda")
    linear_cross_entropy(hidden_states, weight, labels, weights, backend="csrc").sum().backward()
    assert weight.grad is not None and weight.grad.isnan().all()


def gradients_in_fp8(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_word: int,
    statistics: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In both orders; that by words lies within a larger tensor, whose rest stays as it was."""
    rows, words = logits.shape
    gradient = torch.full((rows, words), torch.nan, device="cuda").to(torch.float8_e5m2)
    whole = torch.full((words, rows + 48), 1.0, device="cuda").to(torch.float8_e5m2)
    transposed = whole[:, 16 : 16 + rows]
    transposed.view(torch.uint8).fill_(0x7F)
    torch.ops.megatron_kanana.cross_entropy_gradient_fp8(
        logits, labels, first_word, statistics, weights, gradient, transposed
    )
    assert (whole[:, :16].float() == 1).all() and (whole[:, 16 + rows :].float() == 1).all()
    return gradient, transposed


@pytest.mark.parametrize("words", [16, 144, 4112, 128256])
@pytest.mark.parametrize("rows", [16, 144, 400])
def test_gradients_in_fp8_are_those_of_the_reference_in_both_orders(rows: int, words: int) -> None:
    generator = torch.Generator().manual_seed(words + rows)
    logits = (5 * torch.randn(rows, words, generator=generator)).cuda().bfloat16()
    first_word = 100
    labels = torch.randint(0, words + 200, (rows,), generator=generator).cuda()
    labels[:8] = first_word + words - 1
    weights = GRADIENT_OF_ONE * torch.rand(rows, generator=generator).cuda()
    statistics = plain.statistics(logits, labels, first_word)
    kept = logits.clone()
    gradient, transposed = gradients_in_fp8(logits, labels, first_word, statistics, weights)
    expected = logits.float()
    plain.gradient_(expected, labels, first_word, statistics, weights)
    assert torch.equal(logits, kept)
    assert torch.equal(transposed.view(torch.uint8), gradient.view(torch.uint8).t())
    found, right = gradient.float(), expected.to(torch.float8_e5m2).float()
    # A number between two of e5m2 may be rounded to either; what is below the smallest is zero.
    assert float((found != right).float().mean()) < 1e-3
    torch.testing.assert_close(found, expected, rtol=0.1251, atol=2.0**-17)


def test_a_row_that_is_not_finite_shows_in_fp8() -> None:
    logits = torch.randn(16, 1008, device="cuda").bfloat16()
    logits[2, 700] = torch.nan
    labels = torch.zeros(16, dtype=torch.long, device="cuda")
    weights = torch.ones(16, device="cuda")
    statistics = compiled.statistics(logits, labels, 0)
    gradient, _ = gradients_in_fp8(logits, labels, 0, statistics, weights)
    is_bad = gradient.float().isnan().all(1)
    assert is_bad[2] and is_bad.sum() == 1


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tokens", [112, 1552])
def test_losses_and_gradients_in_fp8_are_those_of_float64_with_the_same_roundings(
    tokens: int, known: bool
) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    problem = random_problem(tokens, 256, 5008, "cuda")
    found = in_fp8(problem, "csrc", known=known)
    assert_close(found, problem, losses=2e-3, gradients=1e-2)


def test_a_chunk_in_fp8_whose_losses_do_not_count_adds_nothing() -> None:
    pytest.importorskip("transformer_engine.pytorch")
    hidden_states = torch.randn(64, 32, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(128, 32, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(128, (64,), device="cuda")
    weights = torch.zeros(64, device="cuda")
    losses = linear_cross_entropy(hidden_states, weight, labels, weights, backend="csrc", fp8=True)
    (losses * weights).sum().backward()
    for gradient in (hidden_states.grad, weight.grad):
        assert gradient is not None and not gradient.any()


def test_sizes_between_the_multiples_of_fp8_are_refused() -> None:
    hidden_states = torch.randn(24, 32, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(128, 32, device="cuda").bfloat16()
    labels = torch.randint(128, (24,), device="cuda")
    with pytest.raises(
        RuntimeError, match=r"precision.output_layer = fp8: hidden states .* multiples of 16, got"
    ):
        linear_cross_entropy(hidden_states, weight, labels, backend="csrc", fp8=True)
