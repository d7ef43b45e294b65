"""csrc's losses on a Hopper GPU. Needs torch and this package alone:

python -m pytest --noconftest tests/kernels/test_linear_cross_entropy_sm90.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_kanana.kernels.linear_cross_entropy import compiled, linear_cross_entropy, plain

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
