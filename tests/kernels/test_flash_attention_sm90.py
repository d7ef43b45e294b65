"""csrc's attention on a Hopper GPU against float64. Needs torch and this package alone:

python -m pytest --noconftest tests/kernels/test_flash_attention_sm90.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_kanana.kernels.attention import attention, documents_of

from .attention_reference import (
    Inputs,
    Shape,
    float64_attention,
    float64_gradients,
    random_documents,
    random_inputs,
)

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 300, 511, 640, 777, 1024, 1100]
OUTPUT_ERROR = 3e-3  # root mean square, of that of the exact tensor: a little over bf16's rounding
GRADIENT_ERROR = 6e-3
LARGEST = 60.0  # times as much may one element be off
NAMES = ("gradient of query", "gradient of key", "gradient of value")


def cuda_inputs(shape: Shape, *, seed: int = 0, largest_logit: float | None = None) -> Inputs:
    """Normal random tensors in bf16 on the GPU."""
    return random_inputs(
        shape, seed=seed, dtype=torch.bfloat16, device="cuda", largest_logit=largest_logit
    )


def fresh_maxima(inputs: Inputs) -> torch.Tensor:
    """A buffer before its first call."""
    return torch.full((inputs.query.shape[2],), -torch.inf, device="cuda")


def results(
    inputs: Inputs,
    *,
    causal: bool = True,
    documents: torch.Tensor | None = None,
    deterministic: bool = False,
    scale: float | None = None,
) -> dict[str, torch.Tensor]:
    """Output, max logits and gradients by name."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    query, key, value = leaves
    maxima = fresh_maxima(inputs)
    out = attention(
        query,
        key,
        value,
        inputs.scale if scale is None else scale,
        backend="csrc",
        causal=causal,
        documents_2BS=documents,
        max_logits_N=maxima,
        deterministic=deterministic,
    )
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    return {"output": out.detach(), "max logits": maxima, **dict(zip(NAMES, grads, strict=True))}


def check(
    inputs: Inputs,
    *,
    causal: bool = True,
    documents: torch.Tensor | None = None,
    scale: float | None = None,
    with_gradients: bool = True,
) -> None:
    """Both backward passes beside float64."""
    used = inputs.scale if scale is None else scale
    out, _, maxima = float64_attention(
        inputs.query, inputs.key, inputs.value, used, causal, documents
    )
    exact = {"output": out, "max logits": maxima}
    if with_gradients:
        gradients = float64_gradients(inputs, used, causal, documents)
        exact.update(zip(NAMES, gradients, strict=True))
    for deterministic in (False, True):
        found = results(
            inputs, causal=causal, documents=documents, deterministic=deterministic, scale=scale
        )
        for name, value in found.items():
            assert not value.isnan().any(), name
            if name in exact:
                compare(name, value, exact[name], inputs, used)


def compare(
    name: str, found: torch.Tensor, exact: torch.Tensor, inputs: Inputs, scale: float
) -> None:
    """One result within its limits."""
    if name == "max logits":
        longest = inputs.query.double().norm(dim=3).max() * inputs.key.double().norm(dim=3).max()
        atol = 2**-20 * float(longest) * scale
        torch.testing.assert_close(found.double(), exact, rtol=2**-20, atol=atol)
        return
    limit = OUTPUT_ERROR if name == "output" else GRADIENT_ERROR
    # A gradient that is nearly zero has the error of the products that cancel in it.
    size = max(float(exact.square().mean().sqrt()), 0.0 if name == "output" else 0.3)
    error = (found.double() - exact).abs()
    assert float(error.square().mean().sqrt()) <= limit * size, name
    assert float(error.max()) <= LARGEST * limit * size, name


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int) -> None:
    check(cuda_inputs(Shape(length, 2, 3, 3, 192, 128), seed=length))


@pytest.mark.parametrize("length", [1, 64, 200, 513, 1024])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_widths_with_and_without_a_causal_mask(
    widths: tuple[int, int], causal: bool, length: int
) -> None:
    check(cuda_inputs(Shape(length, 2, 2, 2, *widths), seed=length), causal=causal)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 2), (8, 8), (12, 4)])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 64)])
def test_grouped_queries(heads: tuple[int, int], widths: tuple[int, int]) -> None:
    check(cuda_inputs(Shape(333, 2, *heads, *widths), seed=heads[0]))


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("heads", [1, 5, 32])
def test_batches_and_heads(batch: int, heads: int) -> None:
    check(cuda_inputs(Shape(150, batch, heads, heads, 192, 128), seed=batch))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 64)])
@pytest.mark.parametrize("length", [40, 777, 1500])
def test_documents(length: int, widths: tuple[int, int], padding: bool, causal: bool) -> None:
    documents = random_documents(3, length, seed=length, padding=padding, device="cuda")
    inputs = cuda_inputs(Shape(length, 3, 2, 2, *widths), seed=length)
    check(inputs, causal=causal, documents=documents)


def test_documents_of_one_token_give_their_value() -> None:
    inputs = cuda_inputs(Shape(300, 2, 4, 4, 192, 128))
    documents = documents_of(torch.arange(300, device="cuda").expand(2, 300))
    check(inputs, documents=documents)
    found = results(inputs, documents=documents)
    assert torch.equal(found["output"], inputs.value)
    assert torch.equal(found["gradient of value"], inputs.grad_out)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_see_nothing_are_zero_and_their_logarithm_infinite(causal: bool) -> None:
    inputs = cuda_inputs(Shape(400, 2, 4, 4, 192, 128))
    segment_ids = torch.zeros(2, 400, device="cuda", dtype=torch.int32)
    segment_ids[:, 250:] = -1
    segment_ids[1, :] = -1
    documents = documents_of(segment_ids)
    found = results(inputs, causal=causal, documents=documents)
    padding = (segment_ids < 0).mT
    for name, value in found.items():
        assert value.isfinite().all(), name
        if name != "max logits":
            assert not value[padding].any(), name
    maxima = fresh_maxima(inputs)
    _, logsumexp = torch.ops.megatron_kanana.flash_attention_forward(
        inputs.query, inputs.key, inputs.value, inputs.scale, causal, documents, maxima
    )
    assert torch.equal(logsumexp == -torch.inf, (segment_ids < 0)[:, None].expand_as(logsumexp))
    nothing = documents_of(torch.full_like(segment_ids, -1))
    assert (results(inputs, documents=nothing)["max logits"] == -torch.inf).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [False, True])
def test_logarithms_of_sums(causal: bool, with_documents: bool) -> None:
    inputs = cuda_inputs(Shape(600, 2, 3, 3, 192, 128), seed=5)
    documents = random_documents(2, 600, device="cuda") if with_documents else None
    _, found = torch.ops.megatron_kanana.flash_attention_forward(
        inputs.query, inputs.key, inputs.value, inputs.scale, causal, documents, None
    )
    _, exact, _ = float64_attention(
        inputs.query, inputs.key, inputs.value, inputs.scale, causal, documents
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("largest", [1e-2, 1.0, 30.0, 100.0])
def test_magnitudes(largest: float) -> None:
    check(cuda_inputs(Shape(700, 1, 4, 4, 192, 128), largest_logit=largest))


@pytest.mark.parametrize("largest", [1e3, 1e4])
def test_great_logits(largest: float) -> None:
    # Gradients of queries and keys nearly cancel here, and are products of great numbers.
    inputs = cuda_inputs(Shape(700, 1, 4, 4, 192, 128), largest_logit=largest)
    check(inputs, with_gradients=False)


@pytest.mark.parametrize("rise", [2.0, 20.0, 200.0])
@pytest.mark.parametrize("causal", [True, False])
def test_logits_that_rise_slowly_give_the_true_maximum(rise: float, causal: bool) -> None:
    inputs = cuda_inputs(Shape(1500, 1, 4, 4, 192, 128))
    inputs.query.mul_(0.05)[..., 0] += 1.0
    slope = torch.linspace(0, rise / inputs.scale, 1500, device="cuda")[:, None, None]
    inputs.key.mul_(0.05)[..., 0] += slope.bfloat16()
    # Keys of up to rise / scale make gradients of queries as much larger.
    check(inputs, causal=causal, with_gradients=rise < 10)


def test_equal_keys_and_zero_queries() -> None:
    inputs = cuda_inputs(Shape(500, 2, 4, 4, 192, 128))
    equal = dataclasses.replace(inputs, key=inputs.key[:1].expand_as(inputs.key).contiguous())
    check(equal)
    check(dataclasses.replace(inputs, query=torch.zeros_like(inputs.query)))


def test_a_scale_of_its_own() -> None:
    inputs = cuda_inputs(Shape(500, 2, 4, 4, 192, 128))
    for scale in (0.003, 0.2):
        check(inputs, scale=scale)


def test_strided_inputs_as_mla_and_others_make_them() -> None:
    shape = Shape(300, 2, 4, 4, 192, 128)
    inputs = cuda_inputs(shape)
    expected = results(inputs, deterministic=True)
    both = torch.cat([torch.zeros_like(inputs.value), inputs.value], dim=3)
    unaligned = torch.cat([inputs.query[..., :1], inputs.query], dim=3)
    strided = {
        "values beside keys": dataclasses.replace(inputs, value=both[..., 128:]),
        "batch first": Inputs(
            *(
                x.transpose(0, 1).contiguous().transpose(0, 1)
                for x in (inputs.query, inputs.key, inputs.value, inputs.grad_out)
            )
        ),
        "rows off 16 bytes": dataclasses.replace(inputs, query=unaligned[..., 1:]),
        "columns apart": dataclasses.replace(inputs, key=inputs.key.mT.contiguous().mT),
        "one gradient for all": dataclasses.replace(
            inputs, grad_out=inputs.grad_out[:1, :1, :1].expand_as(inputs.grad_out)
        ),
    }
    for name, changed in strided.items():
        assert not all(x.is_contiguous() for x in vars(changed).values()), name
        found = results(changed, deterministic=True)
        if name == "one gradient for all":
            dense = dataclasses.replace(changed, grad_out=changed.grad_out.contiguous())
            expected = results(dense, deterministic=True)
        for result, value in expected.items():
            assert torch.equal(found[result], value), (name, result)


@pytest.mark.parametrize("heads", [(16, 16), (8, 2)])
@pytest.mark.parametrize("with_documents", [False, True])
def test_deterministic_gradients_have_the_same_bits(
    heads: tuple[int, int], with_documents: bool
) -> None:
    documents = random_documents(2, 1500, device="cuda") if with_documents else None
    inputs = cuda_inputs(Shape(1500, 2, *heads, 192, 128))
    first = results(inputs, documents=documents, deterministic=True)
    for _ in range(5):
        again = results(inputs, documents=documents, deterministic=True)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_outputs_and_maxima_have_the_same_bits_in_every_call() -> None:
    inputs = cuda_inputs(Shape(1500, 2, 8, 8, 192, 128))
    with_maxima = results(inputs)
    for _ in range(5):
        again = results(inputs)
        assert torch.equal(again["output"], with_maxima["output"])
        assert torch.equal(again["max logits"], with_maxima["max logits"])
    without = attention(inputs.query, inputs.key, inputs.value, inputs.scale, backend="csrc")
    assert torch.equal(without, with_maxima["output"])


def test_maxima_are_raised_over_calls_and_recompute() -> None:
    batches = [cuda_inputs(Shape(500, 2, 8, 8, 192, 128), seed=seed) for seed in range(3)]
    each = torch.stack([results(inputs)["max logits"] for inputs in batches])
    maxima = fresh_maxima(batches[0])
    for inputs in batches:
        query = inputs.query.clone().requires_grad_()

        def run(query: torch.Tensor, inputs: Inputs = inputs) -> torch.Tensor:
            return attention(
                query, inputs.key, inputs.value, inputs.scale, backend="csrc", max_logits_N=maxima
            )

        out = checkpoint(run, query, use_reentrant=False)
        (grad,) = torch.autograd.grad(out, query, inputs.grad_out)
        assert grad.isfinite().all()
    assert torch.equal(maxima, each.amax(0))


def test_negative_logits_raise_the_maxima_too() -> None:
    inputs = cuda_inputs(Shape(300, 1, 4, 4, 192, 128))
    inputs.query.abs_()
    inputs.key.abs_().neg_()
    assert float(results(inputs)["max logits"].max()) < 0
    check(inputs)


def test_one_graph_for_torch_compile() -> None:
    inputs = cuda_inputs(Shape(300, 2, 4, 4, 192, 128))
    documents = random_documents(2, 300, device="cuda")
    expected = results(inputs, documents=documents, deterministic=True)
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    query, key, value = leaves
    maxima = fresh_maxima(inputs)
    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(
        query,
        key,
        value,
        inputs.scale,
        backend="csrc",
        documents_2BS=documents,
        max_logits_N=maxima,
        deterministic=True,
    )
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    for name, found in zip(expected, (out, maxima, *grads), strict=True):
        assert torch.equal(found.detach(), expected[name]), name


def test_nan_stays_in_its_rows() -> None:
    inputs = cuda_inputs(Shape(300, 1, 2, 2, 192, 128))
    expected = results(inputs)["output"]
    inputs.query[100, 0, 1] = torch.nan
    found = results(inputs)["output"]
    assert found[100, 0, 1].isnan().all()
    found[100, 0, 1] = expected[100, 0, 1]
    assert torch.equal(found, expected)


def test_other_dtypes_and_widths_are_refused_by_name() -> None:
    inputs = cuda_inputs(Shape(20, 1, 2, 2, 96, 64))
    with pytest.raises(RuntimeError, match=r"kernels.backend = csrc: .*\(96, 64\)"):
        results(inputs)
    wide = random_inputs(Shape(20, 1, 2, 2, 192, 128), device="cuda")
    with pytest.raises(RuntimeError, match=r"kernels.backend = csrc: .*float32"):
        results(wide)


@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("deterministic", [False, True])
def test_long_sequences_need_no_matrix_of_sequence_by_sequence(
    length: int, deterministic: bool
) -> None:
    inputs = cuda_inputs(Shape(length, 1, 2, 2, 192, 128))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = results(inputs, deterministic=deterministic)
    grown = torch.cuda.max_memory_allocated() - before
    # Output and gradients in bf16, sums for queries in fp32, and three numbers a query.
    rows = 2 * length
    assert grown <= rows * (2 * (128 + 192 + 192 + 128) + 4 * 192 + 4 * 3 + 8) + 2**22
    assert all(value.isfinite().all() for value in found.values())
    last = slice(length - 64, length)
    logits = torch.einsum("sbnh,tbnh->bnst", inputs.query[last].double(), inputs.key.double())
    hidden = torch.ones(64, length, dtype=torch.bool, device="cuda").triu(length - 63)
    weights = (logits * inputs.scale).masked_fill(hidden, -torch.inf).softmax(3)
    exact = torch.einsum("bnst,tbnv->sbnv", weights, inputs.value.double())
    compare("output", found["output"][last], exact, inputs, inputs.scale)
