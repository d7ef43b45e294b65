"""csrc's norms and embedding gradients on a Hopper GPU. Needs torch and this package alone:

python -m pytest --noconftest tests/kernels/test_norm_sm90.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_kanana.kernels.embedding import lookup
from megatron_kanana.kernels.norm import rms_norm

pytestmark = pytest.mark.gpu

EPSILON = 1e-6
BF16_ROUNDING = 2.0**-8


def with_main_grad(weight: torch.Tensor, *, main_grad: bool) -> Any:
    parameter: Any = torch.nn.Parameter(weight)
    if main_grad:
        parameter.main_grad = torch.ones_like(weight, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    return parameter


def gradient_of(parameter: Any) -> torch.Tensor:
    """The gradient, without what `with_main_grad` began with."""
    if not hasattr(parameter, "main_grad"):
        found: torch.Tensor = parameter.grad
        return found.double()
    assert parameter.grad_added_to_main_grad
    found = parameter.main_grad
    return found.double() - 1.0


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference, over that of what is exact."""
    return float((found.double() - exact).norm() / exact.norm())


def norm_of(
    x: torch.Tensor, weight: Any, grad: torch.Tensor, *, zero_centered: bool, ours: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input; that of the weight goes where it belongs."""
    leaf = x.detach().requires_grad_()
    if ours:
        out = rms_norm(leaf, weight, EPSILON, zero_centered=zero_centered)
    else:
        gain = weight + 1.0 if zero_centered else weight
        out = F.rms_norm(leaf, gain.shape, gain, EPSILON)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("width", [8, 64, 512, 576, 2048, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("rows", [1, 3, 777, 20000])
def test_norms_and_their_gradients_are_as_exact_as_torchs(
    rows: int, width: int, zero_centered: bool, main_grad: bool
) -> None:
    if rows * width > 2**26:
        pytest.skip("float64 of this many numbers takes long")
    generator = torch.Generator("cuda").manual_seed(rows + width)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").bfloat16()

    # Rows lie apart, as those of the compressed keys and values do beside the rotary key.
    x = (3 * normal(rows, 1, width + 64))[..., :width]
    gain, grad = 0.1 * normal(width) + (not zero_centered), normal(rows, 1, width)
    exact_gain = with_main_grad(gain.double(), main_grad=False)
    exact = norm_of(x.double(), exact_gain, grad.double(), zero_centered=zero_centered, ours=False)
    own_gain = with_main_grad(gain.clone(), main_grad=main_grad)
    own = norm_of(x, own_gain, grad, zero_centered=zero_centered, ours=True)
    torch_gain = with_main_grad(gain.clone(), main_grad=False)
    other = norm_of(x, torch_gain, grad, zero_centered=zero_centered, ours=False)
    for found, peer, right in zip(own, other, exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == right.shape
        assert error(found, right) <= 1.02 * error(peer, right) + 1e-6
    limit = 1e-5 if main_grad else BF16_ROUNDING
    assert error(gradient_of(own_gain), exact_gain.grad) <= limit


def test_a_norm_of_no_rows_has_no_gradient() -> None:
    gain = with_main_grad(torch.ones(64, device="cuda").bfloat16(), main_grad=True)
    x = torch.empty(0, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, gain, EPSILON, zero_centered=False).sum().backward()
    assert not gradient_of(gain).any()


def test_norms_have_the_same_bits_each_time_and_show_what_is_not_finite() -> None:
    x = torch.randn(5000, 2048, device="cuda").bfloat16()
    x[17, 3] = float("nan")
    grad = torch.randn(5000, 2048, device="cuda").bfloat16()
    runs = []
    for _ in range(3):
        gain = with_main_grad(torch.ones(2048, device="cuda").bfloat16(), main_grad=True)
        runs.append((*norm_of(x, gain, grad, zero_centered=False, ours=True), gain.main_grad))
    for again in runs[1:]:
        for first, second in zip(runs[0], again, strict=True):
            assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    out, grad_x, grad_gain = runs[0]
    assert (
        out.isnan().any(-1).nonzero().tolist()
        == [[17]]
        == grad_x.isnan().any(-1).nonzero().tolist()
    )
    assert grad_gain.isnan().all()


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("some_elsewhere", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "words", "same"),
    [
        (1, 8, 5, 0),
        (100, 264, 50, 0),
        (4096, 2048, 128256, 0),
        (4096, 512, 3000, 2500),
        (999, 64, 1, 0),
    ],
)
def test_rows_of_words_get_the_sums_of_their_tokens(
    tokens: int,
    width: int,
    words: int,
    same: int,
    some_elsewhere: bool,
    tokens_first: bool,
    main_grad: bool,
) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens + words)
    ids = torch.randint(words, (2, tokens), generator=generator, device="cuda")
    ids[:, :same] = 0
    if some_elsewhere:
        ids[torch.rand(ids.shape, generator=generator, device="cuda") < 0.5] = -1
    values = torch.randn(words, width, generator=generator, device="cuda").bfloat16()
    grad = torch.randn(2, tokens, width, generator=generator, device="cuda").bfloat16()
    exact = torch.zeros(words, width, dtype=torch.float64, device="cuda")
    inside = ids >= 0
    exact.index_add_(0, ids[inside], grad[inside].double())
    weight = with_main_grad(values.clone(), main_grad=main_grad)
    found = lookup(ids, weight, some_elsewhere=some_elsewhere)
    expected = torch.where(inside[..., None], values[ids.clamp(min=0)], 0.0)
    assert torch.equal(found, expected)
    if tokens_first:
        found.transpose(0, 1).contiguous().backward(grad.transpose(0, 1).contiguous())
    else:
        found.backward(grad)
    limit = 1e-6 if main_grad else BF16_ROUNDING
    if inside.any():
        assert error(gradient_of(weight), exact) <= limit
    else:
        assert not gradient_of(weight).any()


def test_an_embeddings_gradient_has_the_same_bits_each_time() -> None:
    ids = torch.randint(300, (4, 4096), device="cuda")
    grad = torch.randn(4, 4096, 2048, device="cuda").bfloat16()
    found = []
    for _ in range(3):
        weight = with_main_grad(torch.ones(300, 2048, device="cuda").bfloat16(), main_grad=True)
        lookup(ids, weight, some_elsewhere=False).backward(grad)
        found.append(weight.main_grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
