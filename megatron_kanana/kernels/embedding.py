"""Looking words up, with gradients that touch the rows of the words that were there alone.

torch's gradient of an embedding is as large as the embedding: with 128,256 words of 2,048 numbers
525 MB, which are filled with zeros and then added to the fp32 sums, whatever was looked up.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from .native import load_native_operations
from .weight_gradients import gradient_buffer, gradient_to_return

_operations = torch.ops.megatron_kanana


def lookup(words: torch.Tensor, weight: torch.Tensor, *, some_elsewhere: bool) -> torch.Tensor:
    """Rows of words; their gradients are added to `weight.main_grad`, if there is one.

    Sums are taken in fp32 and in the order of the tokens: the same bits run to run.

    Args:
        words: int64 [batch, tokens], rows of `weight`; with `some_elsewhere` -1 for zeros.
        weight: bf16 [words, width] on a Hopper GPU; the width is a multiple of 8.
        some_elsewhere: whether any word may be -1.

    Returns:
        bf16 [batch, tokens, width].

    Raises:
        RuntimeError: in the backward pass, the width is no multiple of 8, or dtypes are others.
    """
    result: torch.Tensor = _Lookup.apply(words, weight, some_elsewhere)
    return result


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, words: torch.Tensor, weight: torch.Tensor, some_elsewhere: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(words)
        # Not save_for_backward: what activation recompute gives back has lost `main_grad`.
        ctx.weight = weight
        if not some_elsewhere:
            return F.embedding(words, weight)
        return F.embedding(words.clamp(min=0), weight).masked_fill_(words[..., None] < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        _load()
        (words,) = ctx.saved_tensors
        if not grad_out.is_contiguous():  # megatron-core has tokens before the batch
            words, grad_out = words.transpose(0, 1), grad_out.transpose(0, 1)
        sorted_words, tokens_of = words.reshape(-1).sort(stable=True)
        buffer = gradient_buffer(ctx.weight)
        _operations.embedding_add_gradient(
            sorted_words,
            tokens_of,
            grad_out.reshape(-1, grad_out.shape[-1]).contiguous(),
            buffer,
        )
        return None, gradient_to_return(ctx.weight, buffer), None


@functools.cache
def _load() -> None:
    load_native_operations("kernels.norm_backend")
