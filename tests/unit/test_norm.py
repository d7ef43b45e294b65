"""RMSNorm against its definition in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_kanana.model.norm import RMSNorm


def make(*, zero_centered: bool, sequence_parallel: bool = False) -> Any:
    """A norm of width 24."""
    config: Any = SimpleNamespace(
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=torch.float32,
        sequence_parallel=sequence_parallel,
    )
    return RMSNorm(config, 24, eps=1e-3)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_and_its_gradients_agree_with_float64(zero_centered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = make(zero_centered=zero_centered)
    gain = torch.randn(24, generator=generator)
    with torch.no_grad():
        norm.weight.copy_(gain - 1 if zero_centered else gain)
    x = torch.randn(5, 3, 24, generator=generator, requires_grad=True)
    grad = torch.randn(5, 3, 24, generator=generator)
    exact_x = x.detach().double().requires_grad_()
    exact_gain = gain.double().requires_grad_()
    mean_square = exact_x.square().mean(-1, keepdim=True)
    exact = exact_x / (mean_square + 1e-3).sqrt() * exact_gain
    out = norm(x)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(out, (x, norm.weight), grad)
    theirs = torch.autograd.grad(exact, (exact_x, exact_gain), grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_new_norm_has_gain_one(zero_centered: bool) -> None:
    norm = make(zero_centered=zero_centered, sequence_parallel=True)
    x = torch.full((2, 24), 3.0)
    torch.testing.assert_close(norm(x), torch.ones(2, 24), rtol=1e-3, atol=0)
    assert norm.weight.sequence_parallel is True
