"""Attention as it is defined, in float64, and random inputs for it.

Shape suffixes: S sequence, B batch, N query heads, G key and value heads, H query-key width,
V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    length: int
    batch: int
    query_heads: int
    key_heads: int
    width: int
    value_width: int


@dataclass
class Inputs:
    """Tensors of one call, all contiguous.

    Attributes:
        query: [S, B, N, H].
        key: [S, B, G, H].
        value: [S, B, G, V].
        grad_out: gradient of the output, [S, B, N, V].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor

    @property
    def scale(self) -> float:
        """The usual factor on the logits."""
        return float(self.query.shape[3] ** -0.5)


def random_inputs(
    shape: Shape,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    largest_logit: float | None = None,
) -> Inputs:
    """Normal random tensors.

    Args:
        largest_logit: multiply queries so that the largest scaled logit is about this.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = [shape.query_heads, shape.key_heads, shape.key_heads, shape.query_heads]
    widths = [shape.width, shape.width, shape.value_width, shape.value_width]
    tensors = [
        torch.randn(shape.length, shape.batch, count, width, generator=generator)
        for count, width in zip(heads, widths, strict=True)
    ]
    if largest_logit is not None:
        largest = tensors[0].norm(dim=3).max() * tensors[1].norm(dim=3).max()
        tensors[0] *= largest_logit / (float(largest) * shape.width**-0.5)
    return Inputs(*(tensor.to(device, dtype) for tensor in tensors))


def random_documents(
    batch: int, length: int, *, seed: int = 0, padding: bool = True, device: str = "cpu"
) -> torch.Tensor:
    """Documents of random lengths, other ones in each sample, with padding between and behind them.

    Returns:
        int32 [2, batch, length]: first position of each token's document, and one past its last;
        both a padding token's own position.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = torch.empty(2, batch, length, dtype=torch.int32)
    for sample in range(batch):
        begin = 0
        while begin < length:
            longest = int(torch.randint(1, length + 1, (1,), generator=generator))
            end = begin + int(
                torch.randint(1, min(longest, length - begin) + 1, (1,), generator=generator)
            )
            documents[0, sample, begin:end] = begin
            documents[1, sample, begin:end] = end
            if padding and torch.rand(1, generator=generator) < 0.3:
                documents[:, sample, begin:end] = torch.arange(begin, end, dtype=torch.int32)
            begin = end
    return documents.to(device)


def visible_keys(
    length: int, causal: bool, documents: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which keys (last) each query sees: bool [batch or 1, 1, S, S]."""
    positions = torch.arange(length, device=device)
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (positions[:, None] >= positions[None, :])
    if documents is not None:
        begin, end = documents[0][:, None, :, None], documents[1][:, None, :, None]
        visible = visible & (positions >= begin) & (positions < end)
    return visible


def float64_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = True,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T over the visible keys) V, element by element, in float64.

    Args:
        query: [S, B, N, H].
        key: [S, B, G, H], N a multiple of G.
        value: [S, B, G, V].
        documents: None or int [2, B, S], see `random_documents`.

    Returns:
        the output [S, B, N, V], zero where a query sees nothing, differentiable; the natural
        logarithm of the sum of exponentials [B, N, S]; the largest visible scaled logit of each
        head [N]. The last two are -inf where nothing is visible and have no gradient.
    """
    group = query.shape[2] // key.shape[2]
    key, value = (tensor.double().repeat_interleave(group, dim=2) for tensor in (key, value))
    logits = torch.einsum("sbnh,tbnh->bnst", query.double(), key) * scale
    visible = visible_keys(query.shape[0], causal, documents, query.device)
    logits = logits.masked_fill(~visible, -math.inf)
    sees_something = visible.any(dim=3, keepdim=True)
    # softmax of nothing but -inf is NaN, and so is its gradient.
    probabilities = logits.masked_fill(~sees_something, 0.0).softmax(3) * sees_something
    out = torch.einsum("bnst,tbnv->sbnv", probabilities, value)
    with torch.no_grad():
        logsumexp, maxima = logits.logsumexp(3), logits.amax((0, 2, 3))
    return out, logsumexp, maxima


def float64_gradients(
    inputs: Inputs, scale: float, causal: bool = True, documents: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value for the output's gradient in `inputs`, in float64."""
    leaves = [
        tensor.detach().double().requires_grad_()
        for tensor in (inputs.query, inputs.key, inputs.value)
    ]
    query, key, value = leaves
    out, _, _ = float64_attention(query, key, value, scale, causal, documents)
    out.backward(inputs.grad_out.double())
    grads = [leaf.grad for leaf in leaves]
    assert grads[0] is not None and grads[1] is not None and grads[2] is not None
    return grads[0], grads[1], grads[2]
