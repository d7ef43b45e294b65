"""Losses of a linear output layer, without the logits of all tokens in memory; two backends.

`csrc`: this project's compiled kernels. `torch`: the plain reference. What they differ in is the
part between the products, row by row over a chunk of logits; the products are torch's, or in fp8
Transformer Engine's.

Shape suffixes: T tokens, V words of this process, D hidden size, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import compiled, plain
from .fp8_products import Fp8Products
from .losses import EagerGradients, LaterGradients, losses_alone, weight_gradient_is_smaller
from .products import OwnFormatProducts
from .vocabulary import Vocabulary

__all__ = ["CHUNK_BYTES", "linear_cross_entropy"]

CHUNK_BYTES = 2**30
"""Of logits and what is made of them at once: 4,096 tokens of 128,256 words in bf16, 4,608 with
products in fp8. Each chunk reads and writes the weight's gradient, 8 bytes a weight, which
takes little beside a product with so many tokens."""

_BACKENDS = {"csrc": compiled, "torch": plain}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_cross_entropy(
    hidden_states_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor | None = None,
    *,
    backend: str,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    fp8: bool = False,
) -> torch.Tensor:
    """Cross-entropy of `hidden_states @ weight.T`, which is computed a chunk of tokens at a time.

    The weight's gradient goes straight into `main_grad` where megatron-core's data parallelism gave
    the parameter one (see `kernels.weight_gradients`). docs/loss.md says how gradients come
    about, and what is kept for them.

    Args:
        hidden_states_TD: fp32 or bf16. Under sequence parallelism this process's equal part of the
            tokens, in the order of the group's processes.
        weight_VD: in the dtype of the hidden states; the rows of this process, where the vocabulary
            is split evenly over `tp_group` in the order of its processes.
        labels_T: int64, of all tokens, numbers over the whole vocabulary. Where a label is no word,
            the loss means nothing and its weight must be zero.
        weights_T: what the gradient of the losses will be proportional to, such as the loss mask;
            fp32. With it no product is computed twice. None if that is not known.
        backend: 'csrc' or 'torch'; `choose_loss_backend` knows which ones run here.
        tp_group: processes over which the vocabulary is split; None for one. All of them must call
            this with the same tokens.
        sequence_parallel: whether hidden states, and their gradients, are split over `tp_group`.
        chunk_bytes: most bytes of a chunk's logits and what is made of them, if that is one token's
            or more, 512 tokens' with products in fp8.
        fp8: whether the products are in fp8 where gradients are wanted (`fp8_products`, of bf16 on
            Hopper with Transformer Engine, tokens and sizes in multiples of 16).

    Returns:
        fp32 [tokens], the same on all processes of `tp_group`.

    Raises:
        RuntimeError: shapes or dtypes do not go together; or, in the backward pass on a CPU, the
            losses' gradient is not proportional to `weights_T`. On a GPU, which would have to be
            waited for, the weight's gradient is then NaN.
    """
    vocabulary = Vocabulary(_BACKENDS[backend], tp_group, sequence_parallel, chunk_bytes)
    vocabulary.check(hidden_states_TD, weight_VD, labels_T, weights_T)
    tensors = (hidden_states_TD, weight_VD, labels_T)
    products_of = Fp8Products if fp8 else OwnFormatProducts
    learns = hidden_states_TD.requires_grad or weight_VD.requires_grad
    losses_T: torch.Tensor
    if not (torch.is_grad_enabled() and learns):
        losses_T = losses_alone(vocabulary, *tensors)
    elif weights_T is None or not weight_gradient_is_smaller(weight_VD, labels_T):
        losses_T = LaterGradients.apply(vocabulary, products_of, *tensors)
    else:
        losses_T = EagerGradients.apply(vocabulary, products_of, *tensors, weights_T)
    return losses_T
