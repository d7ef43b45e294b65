"""Attention with max logits behind its one function: every backend against float64."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_kanana.kernels.attention import attention, documents_of, documents_of_lengths
from megatron_kanana.kernels.backend import choose_backend

from .attention_reference import (
    Inputs,
    Shape,
    float64_attention,
    float64_gradients,
    random_documents,
    random_inputs,
)

SHAPES = [
    Shape(1, 1, 1, 1, 8, 8),
    Shape(7, 2, 3, 3, 24, 16),
    Shape(64, 1, 2, 2, 192, 128),
    Shape(129, 3, 4, 2, 48, 32),
]
ON_CPU = ["torch", "csrc", "sdpa"]


def fresh_maxima(inputs: Inputs) -> torch.Tensor:
    """A buffer before its first call."""
    return torch.full((inputs.query.shape[2],), -torch.inf, device=inputs.query.device)


def results(
    backend: str,
    inputs: Inputs,
    *,
    causal: bool = True,
    documents: torch.Tensor | None = None,
    deterministic: bool = False,
    run: Callable[..., torch.Tensor] = attention,
) -> dict[str, torch.Tensor]:
    """Output, max logits and gradients by name."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    maxima = fresh_maxima(inputs)
    out = run(
        *leaves,
        inputs.scale,
        backend=backend,
        causal=causal,
        documents_2BS=documents,
        max_logits_N=maxima,
        deterministic=deterministic,
    )
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    names = ("gradient of query", "gradient of key", "gradient of value")
    return {
        "output": out.detach(),
        "max logits": maxima,
        **dict(zip(names, grads, strict=True)),
    }


def largest_errors(
    backend: str, inputs: Inputs, causal: bool, documents: torch.Tensor | None
) -> dict[str, float]:
    """Largest absolute error of each result."""
    found = results(backend, inputs, causal=causal, documents=documents)
    assert found["output"].dtype == inputs.value.dtype
    out, _, maxima = float64_attention(
        inputs.query, inputs.key, inputs.value, inputs.scale, causal, documents
    )
    exact = (out, maxima, *float64_gradients(inputs, inputs.scale, causal, documents))
    return {
        name: float((value.double() - right).abs().nan_to_num(torch.inf).max())
        for (name, value), right in zip(found.items(), exact, strict=True)
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_cpu_backends_agree_with_float64(
    backend: str, shape: Shape, with_documents: bool, causal: bool
) -> None:
    documents = random_documents(shape.batch, shape.length, seed=1) if with_documents else None
    errors = largest_errors(backend, random_inputs(shape, seed=2), causal, documents)
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("backend", ON_CPU)
def test_documents_of_one_sequence_do_not_see_one_another(backend: str) -> None:
    inputs = random_inputs(Shape(20, 2, 2, 2, 16, 8), seed=7)
    segment_ids = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4, [0] * 20])
    together = results(backend, inputs, documents=documents_of(segment_ids))
    alone = []
    for sample, document in ((0, slice(0, 7)), (0, slice(7, 16)), (1, slice(0, 20))):
        part = Inputs(
            *(
                tensor[document, sample : sample + 1]
                for tensor in (inputs.query, inputs.key, inputs.value, inputs.grad_out)
            )
        )
        alone.append(results(backend, part))
        for name in together.keys() - {"max logits"}:
            torch.testing.assert_close(
                together[name][document, sample], alone[-1][name][:, 0], rtol=0, atol=2e-6
            )
    expected = torch.stack([one["max logits"] for one in alone]).amax(0)
    torch.testing.assert_close(together["max logits"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_padding_sees_nothing_and_is_seen_by_nobody(backend: str) -> None:
    inputs = random_inputs(Shape(12, 1, 2, 2, 16, 8), seed=8)
    segment_ids = torch.tensor([[0] * 5 + [-1] * 3 + [1] * 3 + [-1]])
    found = results(backend, inputs, documents=documents_of(segment_ids))
    padding = (segment_ids[0] < 0).nonzero().flatten()
    for name in found.keys() - {"max logits"}:
        assert found[name].isfinite().all()
        assert not found[name][padding].any(), name
    for tensor in (inputs.query, inputs.key, inputs.value, inputs.grad_out):
        tensor[padding] = 1e3
    changed = results(backend, inputs, documents=documents_of(segment_ids))
    for name, value in found.items():
        torch.testing.assert_close(changed[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_batch_of_padding_leaves_the_maxima_as_they_were(backend: str) -> None:
    inputs = random_inputs(Shape(9, 2, 2, 2, 16, 8))
    documents = documents_of(torch.full((2, 9), -1))
    found = results(backend, inputs, documents=documents)
    assert torch.equal(found["max logits"], fresh_maxima(inputs))
    assert not any(value.any() for name, value in found.items() if name != "max logits")


@pytest.mark.parametrize("backend", ON_CPU)
def test_maxima_are_raised_in_the_callers_buffer_over_calls(backend: str) -> None:
    batches = [random_inputs(Shape(9, 1, 4, 4, 16, 8), seed=seed) for seed in range(4)]
    each = torch.stack([results(backend, inputs)["max logits"] for inputs in batches])
    assert len(set(each.argmax(0).tolist())) > 1  # heads whose largest logit is in other batches
    maxima = fresh_maxima(batches[0])
    for inputs in batches:
        attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.scale,
            backend=backend,
            max_logits_N=maxima,
        )
    assert torch.equal(maxima, each.amax(0))
    assert not maxima.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_activation_recompute_changes_nothing(backend: str, reentrant: bool) -> None:
    inputs = random_inputs(Shape(33, 2, 4, 2, 24, 16), seed=9)
    plain = results(backend, inputs)

    def recomputed(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, **options: Any
    ) -> torch.Tensor:
        def run(*tensors: torch.Tensor) -> torch.Tensor:
            query, key, value = tensors
            return attention(query, key, value, scale, **options)

        out: torch.Tensor = checkpoint(run, query, key, value, use_reentrant=reentrant)
        return out

    again = results_backward(backend, inputs, recomputed)
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


def results_backward(
    backend: str, inputs: Inputs, run: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """As `results`, through `.backward()`, which reentrant recompute needs."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    maxima = fresh_maxima(inputs)
    out = run(*leaves, inputs.scale, backend=backend, max_logits_N=maxima)
    out.backward(inputs.grad_out)
    names = ("gradient of query", "gradient of key", "gradient of value")
    grads = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    assert None not in grads.values()
    return {"output": out.detach(), "max logits": maxima, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("with_documents", [False, True])
def test_compiled_operations_are_one_graph_for_torch_compile(with_documents: bool) -> None:
    inputs = random_inputs(Shape(33, 2, 4, 2, 24, 16), seed=10)
    documents = random_documents(2, 33, seed=3) if with_documents else None
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = results("csrc", inputs, documents=documents)
    traced = results("csrc", inputs, documents=documents, run=compiled)
    for name, value in eager.items():
        assert torch.equal(traced[name], value), name


def test_compiled_operations_tell_torch_what_they_change_and_return() -> None:
    inputs = random_inputs(Shape(17, 2, 4, 2, 24, 16), seed=11)
    results("csrc", inputs)  # loads and registers them
    tensors = (inputs.query, inputs.key, inputs.value)
    documents = random_documents(2, 17)
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.megatron_kanana.flash_attention_forward
    backward = torch.ops.megatron_kanana.flash_attention_backward
    for chosen, maxima in ((None, None), (documents, fresh_maxima(inputs))):
        options = (inputs.scale, True, chosen)
        torch.library.opcheck(forward, (*tensors, *options, maxima), test_utils=checks)
        out, logsumexp = forward(*tensors, *options, maxima)
        arguments = (inputs.grad_out, *tensors, out, logsumexp, *options, True)
        torch.library.opcheck(backward, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ON_CPU)
def test_any_strides_are_read(backend: str) -> None:
    shape = Shape(21, 2, 4, 2, 24, 16)
    inputs = random_inputs(shape, seed=12)
    expected = results(backend, inputs)
    orders = itertools.cycle([(1, 0, 2, 3), (2, 3, 1, 0), (3, 0, 1, 2)])
    strided = Inputs(
        *(
            tensor.permute(order).contiguous().permute([order.index(i) for i in range(4)])
            for tensor, order in zip(
                (inputs.query, inputs.key, inputs.value, inputs.grad_out), orders, strict=False
            )
        )
    )
    assert not strided.key.is_contiguous()
    found = results(backend, strided)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "csrc"])
def test_bf16_error_is_one_rounding_of_the_results(backend: str) -> None:
    inputs = random_inputs(Shape(64, 2, 2, 2, 48, 32), seed=13, dtype=torch.bfloat16)
    errors = largest_errors(backend, inputs, True, None)
    assert errors["output"] < 2**-8 * 4  # outputs reach 4; bf16 keeps 8 bits
    assert errors["max logits"] < 1e-5
    assert max(errors.values()) < 2**-8 * 32, errors


@pytest.mark.parametrize("backend", ["torch", "csrc"])
@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3, 1e4])
def test_extreme_logits_keep_their_precision(backend: str, largest: float) -> None:
    inputs = random_inputs(Shape(65, 1, 2, 2, 32, 16), seed=3, largest_logit=largest)
    found = results(backend, inputs)
    out, _, maxima = float64_attention(inputs.query, inputs.key, inputs.value, inputs.scale)
    # fp32 logits up to 1e4 carry an error of 2^-24 * 1e4 times a few into the exponent.
    atol = 5e-6 + largest * 2**-20
    torch.testing.assert_close(found["output"].double(), out, rtol=0, atol=atol)
    torch.testing.assert_close(found["max logits"].double(), maxima, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ON_CPU)
def test_keys_after_a_query_do_not_change_its_output(backend: str) -> None:
    inputs = random_inputs(Shape(20, 1, 2, 2, 16, 8), seed=4)
    before = results(backend, inputs)["output"]
    inputs.key[12:], inputs.value[12:] = 50.0, -50.0
    after = results(backend, inputs)["output"]
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=0)
    assert not torch.equal(before[12:], after[12:])


@pytest.mark.parametrize("backend", [*ON_CPU, "te", "cudnn"])
@pytest.mark.parametrize("queries", [1, 5])
def test_fewer_queries_are_the_last_positions(backend: str, queries: int) -> None:
    inputs = random_inputs(Shape(23, 2, 3, 3, 16, 8), seed=6)
    exact, _, _ = float64_attention(inputs.query, inputs.key, inputs.value, 0.25)
    out = attention(inputs.query[-queries:], inputs.key, inputs.value, 0.25, backend=backend)
    torch.testing.assert_close(out.double(), exact[-queries:], rtol=0, atol=5e-6)


def test_documents_are_where_segments_begin_and_end() -> None:
    segment_ids = torch.tensor([[0, 0, 1, 2, 2, -1, -1], [-1, 0, 1, 1, -1, 2, 2]])
    documents = documents_of(segment_ids)
    assert documents.dtype == torch.int32
    assert documents[0].tolist() == [[0, 0, 2, 3, 3, 5, 6], [0, 1, 2, 2, 4, 5, 5]]
    assert documents[1].tolist() == [[2, 2, 3, 5, 5, 5, 6], [0, 2, 4, 4, 4, 7, 7]]


def test_documents_of_lengths_and_of_segments_are_the_same() -> None:
    lengths = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)  # one of them is empty
    segment_ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, -1, -1]])
    assert torch.equal(documents_of_lengths(lengths, 11), documents_of(segment_ids))
    assert torch.equal(documents_of_lengths(lengths, 9), documents_of(segment_ids[:, :9]))


def choice(requested: str, device_type: str, **options: Any) -> str:
    """`choose_backend` for MLA's widths in bf16 where nothing else is said."""
    return choose_backend(
        requested, device_type, **{"dtype": torch.bfloat16, "widths": (192, 128), **options}
    )


def test_auto_takes_the_compiled_operations_where_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = "megatron_kanana.kernels.backend"
    assert choice("auto", "cpu", widths=(24, 16), dtype=torch.float32) == "csrc"
    assert choice("torch", "cpu") == "torch"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(f"{backend}.has_operation_for", lambda *_: True)
    assert choice("auto", "cuda") == "csrc"
    assert choice("auto", "cuda", widths=(24, 16)) == "sdpa"
    assert choice("auto", "cuda", dtype=torch.float32) == "sdpa"
    assert choice("auto", "cuda", dtype=torch.float32, deterministic=True) == "torch"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert choice("auto", "cuda") == "sdpa"
    monkeypatch.setattr(f"{backend}.native_library_error", lambda: "not built")
    assert choice("auto", "cpu") == "torch"


def test_a_backend_that_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cudnn", "transformer_engine"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    backend = "megatron_kanana.kernels.backend"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    with pytest.raises(RuntimeError, match=r"kernels.backend = csrc: a GPU is no Hopper GPU"):
        choice("csrc", "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.raises(RuntimeError, match=r"kernels.backend = csrc: .* no widths \(24, 16\)"):
        choice("csrc", "cuda", widths=(24, 16))
    monkeypatch.setattr(f"{backend}.has_operation_for", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"kernels.backend = csrc: .*build them again"):
        choice("csrc", "cuda")
    with pytest.raises(RuntimeError, match=r"pip .* 'nvidia-cudnn-frontend\[cutedsl\]'"):
        choice("cudnn", "cuda")
    with pytest.raises(RuntimeError, match=r"pip .* 'transformer-engine\[pytorch\]'"):
        choice("te", "cuda")
    inputs = random_inputs(Shape(4, 1, 1, 1, 8, 8))
    documents = random_documents(1, 4)
    with pytest.raises(RuntimeError, match=r"kernels.backend = te: .*set kernels.backend=auto"):
        results("te", inputs, documents=documents)
    with pytest.raises(RuntimeError, match=r"kernels.backend = te: .*ALLOW_NONDETERMINISTIC"):
        results("te", inputs, deterministic=True)


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", [Shape(300, 2, 4, 4, 192, 128), Shape(129, 3, 4, 2, 64, 64)])
@pytest.mark.parametrize("backend", ["torch", "sdpa", "cudnn", "te"])
def test_gpu_backends_agree_with_float64(backend: str, shape: Shape, with_documents: bool) -> None:
    if backend in ("cudnn", "te"):
        pytest.importorskip({"cudnn": "cudnn", "te": "transformer_engine"}[backend])
    if backend == "te" and with_documents:
        pytest.skip("refused")
    documents = random_documents(shape.batch, shape.length, device="cuda")
    inputs = random_inputs(shape, dtype=torch.bfloat16, device="cuda")
    errors = largest_errors(backend, inputs, True, documents if with_documents else None)
    assert errors["output"] < 2**-6, errors
    assert errors["max logits"] < 5e-2, errors
    assert max(errors.values()) < 1e-1, errors


@pytest.mark.gpu
def test_gpu_max_logits_cover_every_block_of_rows() -> None:
    inputs = random_inputs(Shape(2500, 1, 2, 2, 192, 128), dtype=torch.bfloat16, device="cuda")
    for documents in (None, random_documents(1, 2500, device="cuda")):
        found = results("sdpa", inputs, documents=documents)["max logits"]
        exact = float64_attention(
            inputs.query, inputs.key, inputs.value, inputs.scale, True, documents
        )
        torch.testing.assert_close(found.double(), exact[2], rtol=1e-2, atol=0)
