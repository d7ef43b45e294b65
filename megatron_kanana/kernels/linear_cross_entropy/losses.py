"""Losses chunk by chunk, with gradients computed on the way or later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..weight_gradients import gradient_buffer, gradient_to_return
from .products import ChunkLosses, HeadGradients, OwnFormatProducts, Products
from .vocabulary import Vocabulary

PROPORTIONAL = 1e-4
"""How far gradients may be from multiples of the weights they were said to be proportional to."""

Gradients = tuple[torch.Tensor | None, ...]


def weight_gradient_is_smaller(weight_VD: torch.Tensor, labels_T: torch.Tensor) -> bool:
    """Whether the fp32 gradient of the weight takes less memory than the logits of all tokens."""
    return 4 * weight_VD.shape[1] < weight_VD.itemsize * labels_T.shape[0]


def losses_alone(
    vocabulary: Vocabulary,
    hidden_states_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
) -> torch.Tensor:
    """Losses without gradients, fp32 [T]."""
    products = OwnFormatProducts(vocabulary, vocabulary.gather(hidden_states_TD), weight_VD)
    return _losses(_statistics(vocabulary, products, weight_VD, labels_T))


def _chunks(vocabulary: Vocabulary, products: Products, labels_T: torch.Tensor) -> Iterator[slice]:
    return vocabulary.chunks(len(labels_T), products.bytes_per_token, products.token_multiple)


def _statistics(
    vocabulary: Vocabulary, products: Products, weight_VD: torch.Tensor, labels_T: torch.Tensor
) -> torch.Tensor:
    """Of all tokens, a chunk at a time, fp32 [3, T]."""
    parts = []
    for chunk in _chunks(vocabulary, products, labels_T):
        logits_CV = products.logits(chunk)
        parts.append(vocabulary.statistics(logits_CV, weight_VD, labels_T[chunk]))
        del logits_CV  # before the next chunk's are there
    return torch.cat(parts, dim=1)


def _losses(statistics_3T: torch.Tensor) -> torch.Tensor:
    largest_T, sum_T, of_label_T = statistics_3T
    losses_T: torch.Tensor = sum_T.log() - (of_label_T - largest_T)
    return losses_T


class LaterGradients(torch.autograd.Function):
    """Gradients in the backward pass, whatever reaches the losses there.

    The logits are kept where they take no more memory than the weight's gradient in fp32, else
    computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        products_of: type[Products],
        hidden_states_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
    ) -> torch.Tensor:
        products = products_of(vocabulary, vocabulary.gather(hidden_states_TD), weight_VD)
        keeps = not weight_gradient_is_smaller(weight_VD, labels_T)
        logits_TV = None
        if keeps:
            logits_TV = products.logits(slice(0, len(labels_T)))
            statistics_3T = vocabulary.statistics(logits_TV, weight_VD, labels_T)
        else:
            statistics_3T = _statistics(vocabulary, products, weight_VD, labels_T)
        ctx.save_for_backward(hidden_states_TD, weight_VD, labels_T, statistics_3T, logits_TV)
        # What activation recompute gives back has lost `main_grad`.
        ctx.vocabulary, ctx.products_of, ctx.parameter = vocabulary, products_of, weight_VD
        return _losses(statistics_3T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> Gradients:
        hidden_states_TD, weight_VD, labels_T, statistics_3T, logits_TV = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        all_TD = vocabulary.gather(hidden_states_TD)
        products: Products = ctx.products_of(vocabulary, all_TD, weight_VD)
        grad_T = grad_T.float().contiguous()
        _, _, learns_hidden, learns_weight, _ = ctx.needs_input_grad
        grad_hidden_TD = torch.empty_like(all_TD) if learns_hidden else None
        buffer_VD = gradient_buffer(ctx.parameter) if learns_weight else None
        if logits_TV is not None:
            # Its version then tells autograd, which refuses a second pass through the graph.
            torch.autograd.graph.increment_version(logits_TV)
            chunks = [slice(0, len(labels_T))]
        else:
            chunks = list(_chunks(vocabulary, products, labels_T))
        to = HeadGradients(grad_hidden_TD, buffer_VD)
        for chunk in chunks:
            statistics_3C = statistics_3T[:, chunk]
            losses = ChunkLosses(chunk, labels_T[chunk], grad_T[chunk], logits_TV, statistics_3C)
            products.add_gradients(losses, to)
        if grad_hidden_TD is not None:
            grad_hidden_TD = vocabulary.reduce(grad_hidden_TD)
        returned_VD = None if buffer_VD is None else gradient_to_return(ctx.parameter, buffer_VD)
        return None, None, grad_hidden_TD, returned_VD, None


class EagerGradients(torch.autograd.Function):
    """Gradients while the logits are there, up to a factor that the backward pass brings.

    Kept in place of the hidden states are their gradients, and the weight's in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        products_of: type[Products],
        hidden_states_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor,
    ) -> torch.Tensor:
        all_TD = vocabulary.gather(hidden_states_TD)
        products = products_of(vocabulary, all_TD, weight_VD)
        _, _, learns_hidden, learns_weight, _, _ = ctx.needs_input_grad
        grad_hidden_TD = torch.empty_like(all_TD) if learns_hidden else None
        grad_weight_VD = None
        if learns_weight:
            grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32)
        to = HeadGradients(grad_hidden_TD, grad_weight_VD)
        parts = []
        for chunk in _chunks(vocabulary, products, labels_T):
            losses = ChunkLosses(chunk, labels_T[chunk], weights_T[chunk])
            is_first = chunk.start == 0
            statistics_3C = products.add_gradients(losses, to, to_what_is_there=not is_first)
            parts.append(_losses(statistics_3C))
        if grad_hidden_TD is not None:
            grad_hidden_TD = vocabulary.reduce(grad_hidden_TD)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD, weights_T)
        ctx.parameter = weight_VD
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> Gradients:
        grad_hidden_TD, grad_weight_VD, weights_T = ctx.saved_tensors
        factor = _factor(grad_T.float(), weights_T)
        if grad_hidden_TD is not None:
            grad_hidden_TD = (grad_hidden_TD * factor).to(grad_hidden_TD.dtype)
        returned_VD = None
        if grad_weight_VD is not None:
            buffer_VD = gradient_buffer(ctx.parameter)
            buffer_VD.addcmul_(grad_weight_VD, factor)
            returned_VD = gradient_to_return(ctx.parameter, buffer_VD)
        return None, None, grad_hidden_TD, returned_VD, None, None


def _factor(grad_T: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """The number, fp32 [], that the weights must be multiplied with to give the gradients."""
    squares = weights_T.square().sum()
    factor = (grad_T @ weights_T / squares).where(squares > 0, 0.0)
    distance = (grad_T - factor * weights_T).abs().max()
    is_near = distance <= PROPORTIONAL * grad_T.abs().max()
    if not grad_T.is_cuda and not is_near and bool(grad_T.isfinite().all()):
        raise RuntimeError(
            "the gradient of linear_cross_entropy's losses is not proportional to weights_T; "
            "leave weights_T out"
        )
    return factor.where(is_near, torch.nan)
