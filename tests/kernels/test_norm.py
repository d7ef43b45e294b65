"""Norms and the embedding beside torch's, with plain operations in place of the compiled ones.

What is shown is what is around them: which rows they get, and where gradients go. The operations
themselves are compared in test_norm_sm90.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch.utils.checkpoint import checkpoint

from megatron_kanana.kernels import embedding, norm
from megatron_kanana.model.embedding import add_embedding_gradients_in_place

EPSILON = 1e-5
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def plain_operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Strides of the rows that norms were given."""
    seen: list[tuple[int, ...]] = []

    def forward(
        rows: torch.Tensor, gain: torch.Tensor, epsilon: float, zero_centered: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(rows.stride())
        reciprocal = (rows.square().mean(-1) + epsilon).rsqrt()
        return rows * reciprocal[:, None] * (gain + float(zero_centered)), reciprocal

    def backward(
        grad: torch.Tensor,
        rows: torch.Tensor,
        reciprocal: torch.Tensor,
        gain: torch.Tensor,
        zero_centered: bool,
        grad_gain: torch.Tensor,
    ) -> torch.Tensor:
        assert grad.is_contiguous() and not gain.requires_grad
        normal = rows * reciprocal[:, None]
        grad_gain += (grad * normal).sum(0)
        grad_normal = grad * (gain + float(zero_centered))
        mean = (grad_normal * normal).mean(-1, keepdim=True)
        return (grad_normal - normal * mean) * reciprocal[:, None]

    def add_gradient(
        words: torch.Tensor, tokens_of: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor
    ) -> None:
        assert grad.is_contiguous() and words.equal(words.sort().values)
        for word, token in zip(words.tolist(), tokens_of.tolist(), strict=True):
            if word >= 0:
                weight[word] += grad[token]

    operations = SimpleNamespace(
        rms_norm_forward=forward, rms_norm_backward=backward, embedding_add_gradient=add_gradient
    )
    for module in (norm, embedding):
        monkeypatch.setattr(module, "_operations", operations)
        monkeypatch.setattr(module, "_load", lambda: None)
    return seen


def with_main_grad(weight: torch.Tensor) -> Any:
    parameter: Any = torch.nn.Parameter(weight)
    parameter.main_grad = torch.ones_like(weight)
    parameter.grad_added_to_main_grad = False
    return parameter


def recomputed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(function, x, use_reentrant=False)
    return result


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("width", "apart", "stride"), [(16, 0, 16), (16, 8, 24), (16, 3, 16)])
def test_norms_add_to_main_grad_and_take_rows_that_lie_apart(
    width: int,
    apart: int,
    stride: int,
    recompute: bool,
    zero_centered: bool,
    plain_operations: list[tuple[int, ...]],
) -> None:
    x = torch.randn(3, 2, width + apart)[..., :width].requires_grad_()
    initial, grad = torch.randn(width), torch.randn(3, 2, width)
    weight, plain = with_main_grad(initial), torch.nn.Parameter(initial)

    def ours(values: torch.Tensor) -> torch.Tensor:
        return norm.rms_norm(values, weight, EPSILON, zero_centered=zero_centered)

    out = recomputed(ours, x) if recompute else ours(x)
    right = F.rms_norm(x, (width,), plain + float(zero_centered), EPSILON)
    close(out, right)
    (found,) = torch.autograd.grad(out, x, grad)
    expected, of_gain = torch.autograd.grad(right, (x, plain), grad)
    close(found, expected)
    close(weight.main_grad - 1.0, of_gain)
    assert weight.grad_added_to_main_grad
    assert set(plain_operations) == {(stride, 1)}


def test_without_main_grad_gradients_are_returned() -> None:
    weight, words = torch.nn.Parameter(torch.randn(5, 8)), torch.tensor([[4, 1, 4]])
    embedding.lookup(words, weight, some_elsewhere=False).sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 2.0]
    gain = torch.nn.Parameter(torch.ones(8))
    norm.rms_norm(torch.ones(4, 8), gain, EPSILON, zero_centered=False).sum().backward()
    assert gain.grad is not None
    close(gain.grad, torch.full((8,), 4.0))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_parts_of_an_embedding_are_together_the_whole(parts: int, tokens_first: bool) -> None:
    words, width = 12, 8
    values, ids = torch.randn(words, width), torch.randint(words, (2, 9))
    grad = torch.randn(2, 9, width)
    whole = torch.nn.Parameter(values)
    expected = F.embedding(ids, whole)
    expected.backward(grad)
    found, gradients = torch.zeros_like(expected), []
    for part in range(parts):
        first, end = part * words // parts, (part + 1) * words // parts
        layer: Any = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
        torch.nn.Module.__init__(layer)
        layer.weight = with_main_grad(values[first:end].clone())
        layer.tp_group = SimpleNamespace(size=lambda: parts)
        layer.vocab_start_index, layer.vocab_end_index = first, end
        layer.reduce_scatter_embeddings = False
        add_embedding_gradients_in_place(layer)
        with pytest.MonkeyPatch.context() as patch:
            reduce = "reduce_from_tensor_model_parallel_region"
            patch.setattr(f"megatron_kanana.model.embedding.{reduce}", lambda rows, group: rows)
            rows = layer(ids)
        found = found + rows.detach()
        if tokens_first:
            rows.transpose(0, 1).contiguous().backward(grad.transpose(0, 1).contiguous())
        else:
            rows.backward(grad)
        gradients.append(layer.weight.main_grad - 1.0)
    close(found, expected.detach())
    close(torch.cat(gradients), whole.grad)
