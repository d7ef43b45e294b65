"""Causal attention with max logits: every backend against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_kanana.kernels.attention import causal_attention
from megatron_kanana.kernels.backend import choose_backend, native_library_error

# sequence, batch, heads, query-key width, value width
SHAPES = [(1, 1, 1, 8, 8), (7, 2, 3, 24, 16), (64, 1, 2, 192, 128), (129, 3, 4, 48, 32)]


def float64_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Definition, element by element, in float64."""
    length = query.shape[0]
    logits = torch.einsum("sbnh,tbnh->bnst", query, key) * scale
    visible = torch.arange(length)[:, None] >= torch.arange(length)[None, :]
    logits = torch.where(visible.to(logits.device), logits, -math.inf)
    return torch.einsum("bnst,tbnv->sbnv", logits.softmax(-1), value), logits.amax((0, 2, 3))


def random_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str, seed: int
) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output."""
    length, batch, heads, width, value_width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, width, value_width, value_width]
    tensors = [torch.randn(length, batch, heads, size, generator=generator) for size in sizes]
    return [tensor.to(device, dtype) for tensor in tensors]


def largest_errors(
    backend: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Largest absolute error of the output, the maxima and each gradient."""
    scale = shape[3] ** -0.5
    *inputs, grad = random_inputs(shape, dtype, device, seed=sum(shape))
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    query, key, value = ours
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out, maxima = causal_attention(query, key, value, scale, backend=backend, with_max_logits=True)
    assert maxima is not None
    assert maxima.dtype == torch.float32
    assert not maxima.requires_grad
    exact_out, exact_maxima = float64_attention(exact[0], exact[1], exact[2], scale)
    grads = torch.autograd.grad(out, ours, grad)
    exact_grads = torch.autograd.grad(exact_out, exact, grad.double())
    pairs = {
        "output": (out, exact_out),
        "max logits": (maxima, exact_maxima),
        **{
            f"gradient of {n}": p
            for n, p in zip("qkv", zip(grads, exact_grads, strict=True), strict=True)
        },
    }
    return {name: float((a.double() - b).detach().abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "csrc"])
def test_cpu_backends_agree_with_float64(
    backend: str, shape: tuple[int, int, int, int, int]
) -> None:
    assert native_library_error() is None
    errors = largest_errors(backend, shape, torch.float32, "cpu")
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("backend", ["torch", "csrc"])
def test_bf16_error_is_one_rounding_of_the_output(backend: str) -> None:
    errors = largest_errors(backend, (64, 2, 2, 48, 32), torch.bfloat16, "cpu")
    assert errors["output"] < 2**-8 * 4  # outputs reach 4; bf16 keeps 8 bits
    assert errors["max logits"] < 1e-5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_csrc_softmax_survives_extreme_logits(scale: float) -> None:
    query, key, value, _ = random_inputs((65, 1, 2, 32, 16), torch.float32, "cpu", seed=3)
    out, maxima = causal_attention(query, key, value, scale, backend="csrc", with_max_logits=True)
    exact, exact_maxima = float64_attention(query.double(), key.double(), value.double(), scale)
    assert maxima is not None
    # fp32 logits up to 30 * 100 carry an error of 2^-24 * 3000 into the exponent.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3 if scale > 1 else 5e-6)
    torch.testing.assert_close(maxima.double(), exact_maxima, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "csrc"])
def test_keys_after_a_query_do_not_change_its_output(backend: str) -> None:
    query, key, value, _ = random_inputs((20, 1, 2, 16, 8), torch.float32, "cpu", seed=4)
    before, _ = causal_attention(query, key, value, 0.25, backend=backend, with_max_logits=False)
    key[12:], value[12:] = 50.0, -50.0
    after, _ = causal_attention(query, key, value, 0.25, backend=backend, with_max_logits=False)
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=0)
    assert not torch.equal(before[12:], after[12:])


@pytest.mark.parametrize("backend", ["torch", "csrc", "sdpa"])
@pytest.mark.parametrize("queries", [1, 5])
def test_fewer_queries_are_the_last_positions(backend: str, queries: int) -> None:
    query, key, value, _ = random_inputs((23, 2, 3, 16, 8), torch.float32, "cpu", seed=6)
    exact, _ = float64_attention(query.double(), key.double(), value.double(), 0.25)
    out, maxima = causal_attention(
        query[-queries:], key, value, 0.25, backend=backend, with_max_logits=False
    )
    assert maxima is None
    torch.testing.assert_close(out.double(), exact[-queries:], rtol=0, atol=5e-6)


def test_native_operations_refuse_wrong_shapes_and_dtypes() -> None:
    assert native_library_error() is None
    softmax = torch.ops.megatron_kanana.causal_softmax_
    with pytest.raises(RuntimeError, match=r"\[matrices, sequence, sequence\]"):
        softmax(torch.zeros(2, 3, 4), 1.0)
    with pytest.raises(RuntimeError, match="float32"):
        softmax(torch.zeros(2, 3, 3, dtype=torch.float64), 1.0)
    with pytest.raises(RuntimeError, match="contiguous"):
        softmax(torch.zeros(3, 3, 2).permute(2, 0, 1), 1.0)


def test_auto_backend_takes_the_compiled_operations_on_a_cpu() -> None:
    assert choose_backend("auto", "cpu") == "csrc"
    assert choose_backend("auto", "cuda") == "sdpa"
    assert choose_backend("torch", "cpu") == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_gpu_backends_agree_with_float64(
    backend: str, shape: tuple[int, int, int, int, int]
) -> None:
    errors = largest_errors(backend, shape, torch.bfloat16, "cuda")
    assert errors["output"] < 2**-6, errors
    assert errors["max logits"] < 5e-2, errors
    assert max(errors.values()) < 1e-1, errors


@pytest.mark.gpu
def test_gpu_max_logits_cover_every_block_of_rows() -> None:
    query, key, value, _ = random_inputs((2500, 1, 2, 192, 128), torch.bfloat16, "cuda", seed=5)
    _, maxima = causal_attention(query, key, value, 0.1, backend="sdpa", with_max_logits=True)
    _, exact = float64_attention(query.double(), key.double(), value.double(), 0.1)
    assert maxima is not None
    torch.testing.assert_close(maxima.double(), exact, rtol=1e-2, atol=0)
