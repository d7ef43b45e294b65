"""Causal attention with max logits: every backend against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_kanana.kernels.attention import causal_attention, first_keys
from megatron_kanana.kernels.backend import choose_backend, native_library_error

# sequence, batch, heads, query-key width, value width
SHAPES = [(1, 1, 1, 8, 8), (7, 2, 3, 24, 16), (64, 1, 2, 192, 128), (129, 3, 4, 48, 32)]


def float64_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    segment_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Definition, element by element, in float64."""
    length, batch = query.shape[:2]
    if segment_ids is None:
        segment_ids = torch.zeros(batch, length, dtype=torch.int32, device=query.device)
    logits = torch.einsum("sbnh,tbnh->bnst", query, key) * scale
    visible = (torch.arange(length)[:, None] >= torch.arange(length)[None, :]).to(logits.device)
    visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    logits = torch.where(visible, logits, -math.inf)
    counted = torch.where((segment_ids >= 0)[:, None, :, None], logits, -math.inf)
    return torch.einsum("bnst,tbnv->sbnv", logits.softmax(-1), value), counted.amax((0, 2, 3))


def random_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str, seed: int
) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output."""
    length, batch, heads, width, value_width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, width, value_width, value_width]
    tensors = [torch.randn(length, batch, heads, size, generator=generator) for size in sizes]
    return [tensor.to(device, dtype) for tensor in tensors]


def random_segments(batch: int, length: int, device: str) -> torch.Tensor:
    """Documents of random lengths, of each sample others, with padding behind the last."""
    generator = torch.Generator().manual_seed(length)
    begins = torch.rand(batch, length, generator=generator) < 0.2
    ids = begins.cumsum(1) - begins[:, :1].int()
    padding = torch.randint(length // 3 + 1, (batch, 1), generator=generator)
    ids = torch.where(torch.arange(length) < length - padding, ids, -1)
    return ids.to(device, torch.int32)


def largest_errors(
    backend: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    documents: bool = False,
) -> dict[str, float]:
    """Largest absolute error of the output, the maxima and each gradient."""
    scale = shape[3] ** -0.5
    *inputs, grad = random_inputs(shape, dtype, device, seed=sum(shape))
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    query, key, value = ours
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    segment_ids = random_segments(shape[1], shape[0], device) if documents else None
    out, maxima = causal_attention(
        query,
        key,
        value,
        scale,
        backend=backend,
        with_max_logits=True,
        segment_ids_BS=segment_ids,
    )
    assert maxima is not None
    assert maxima.dtype == torch.float32
    assert not maxima.requires_grad
    exact_out, exact_maxima = float64_attention(exact[0], exact[1], exact[2], scale, segment_ids)
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


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "csrc", "sdpa"])
def test_cpu_backends_agree_with_float64(
    backend: str, shape: tuple[int, int, int, int, int], documents: bool
) -> None:
    assert native_library_error() is None
    errors = largest_errors(backend, shape, torch.float32, "cpu", documents=documents)
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("backend", ["torch", "csrc", "sdpa"])
def test_documents_of_one_sequence_do_not_see_one_another(backend: str) -> None:
    query, key, value, _ = random_inputs((20, 2, 2, 16, 8), torch.float32, "cpu", seed=7)
    segment_ids = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4, [0] * 20], dtype=torch.int32)
    together, maxima = causal_attention(
        query,
        key,
        value,
        0.25,
        backend=backend,
        with_max_logits=True,
        segment_ids_BS=segment_ids,
    )
    assert maxima is not None
    found = []
    for sample, document in ((0, slice(0, 7)), (0, slice(7, 16)), (1, slice(0, 20))):
        alone, its_maxima = causal_attention(
            query[document, sample : sample + 1],
            key[document, sample : sample + 1],
            value[document, sample : sample + 1],
            0.25,
            backend=backend,
            with_max_logits=True,
        )
        torch.testing.assert_close(together[document, sample], alone[:, 0], rtol=0, atol=1e-6)
        assert its_maxima is not None
        found.append(its_maxima)
    torch.testing.assert_close(maxima, torch.stack(found).amax(0), rtol=1e-6, atol=1e-6)
    assert together.isfinite().all()


def test_first_keys_are_where_documents_begin() -> None:
    segment_ids = torch.tensor([[0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 0, 2, 3, 3, 5, 5], [0, 1, 1, 1, 1, 1, 1]]
    assert first_keys(segment_ids).tolist() == expected


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
    with pytest.raises(RuntimeError, match=r"first_keys must have shape \[samples, sequence\]"):
        softmax(torch.zeros(4, 3, 3), 1.0, torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="first_keys must be int32"):
        softmax(torch.zeros(4, 3, 3), 1.0, torch.zeros(2, 3, dtype=torch.int64))


def test_auto_backend_takes_the_compiled_operations_on_a_cpu() -> None:
    assert choose_backend("auto", "cpu") == "csrc"
    assert choose_backend("auto", "cuda") == "sdpa"
    assert choose_backend("torch", "cpu") == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_gpu_backends_agree_with_float64(
    backend: str, shape: tuple[int, int, int, int, int], documents: bool
) -> None:
    errors = largest_errors(backend, shape, torch.bfloat16, "cuda", documents=documents)
    assert errors["output"] < 2**-6, errors
    assert errors["max logits"] < 5e-2, errors
    assert max(errors.values()) < 1e-1, errors


@pytest.mark.gpu
def test_gpu_max_logits_cover_every_block_of_rows() -> None:
    query, key, value, _ = random_inputs((2500, 1, 2, 192, 128), torch.bfloat16, "cuda", seed=5)
    for segment_ids in (None, random_segments(1, 2500, "cuda")):
        _, maxima = causal_attention(
            query,
            key,
            value,
            0.1,
            backend="sdpa",
            with_max_logits=True,
            segment_ids_BS=segment_ids,
        )
        _, exact = float64_attention(query.double(), key.double(), value.double(), 0.1, segment_ids)
        assert maxima is not None
        torch.testing.assert_close(maxima.double(), exact, rtol=1e-2, atol=0)
