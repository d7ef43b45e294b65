"""Attention that also returns each head's largest logit, which QK-Clip needs; several backends.

`csrc`: this project's compiled kernels. `cudnn`: NVIDIA's cuDNN frontend. `te`: Transformer
Engine. `sdpa`: torch's fused attention. `torch`: the plain reference.

Shape suffixes: S sequence, T keys where they are more than the queries, B batch, N query heads,
G key-value heads, H query-key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .compiled import compiled_attention
from .cudnn_frontend import cudnn_frontend_attention
from .documents import documents_of, documents_of_lengths
from .fused_torch import fused_torch_attention
from .plain import plain_attention
from .transformer_engine import transformer_engine_attention

__all__ = ["attention", "documents_of", "documents_of_lengths"]


_Implementation = Callable[
    [
        torch.Tensor,  # query
        torch.Tensor,  # key
        torch.Tensor,  # value
        float,  # softmax_scale
        bool,  # causal
        torch.Tensor | None,  # documents
        torch.Tensor | None,  # max_logits
        bool,  # deterministic
    ],
    torch.Tensor,
]

_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "csrc": compiled_attention,
    "cudnn": cudnn_frontend_attention,
    "te": transformer_engine_attention,
    "sdpa": fused_torch_attention,
    "torch": plain_attention,
}


def attention(
    query_SBNH: torch.Tensor,
    key_SBGH: torch.Tensor,
    value_SBGV: torch.Tensor,
    softmax_scale: float,
    *,
    backend: str,
    causal: bool = True,
    documents_2BS: torch.Tensor | None = None,
    max_logits_N: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """softmax(softmax_scale * Q K^T over the visible keys) V, and each head's largest logit.

    With more keys than queries, as when a text is continued from a cache, the queries are the last
    positions. All backends then take the plain implementation: such calls have few queries.

    Args:
        query_SBNH: [sequence, batch, heads, query-key width], any float dtype the backend has.
        key_SBGH: [sequence, batch, key-value heads, query-key width]; the query heads are a
            multiple of them, and query head n uses key-value head n // (N // G).
        value_SBGV: [sequence, batch, key-value heads, value width]; the widths may differ.
        softmax_scale: positive factor on the logits.
        backend: 'csrc', 'cudnn', 'te', 'sdpa' or 'torch'; `kernels.backend.choose_backend` knows
            which ones run here.
        causal: whether a query sees no later keys.
        documents_2BS: int32 [2, batch, sequence], contiguous: the first position of each token's
            document, and one past its last (`documents_of`). A token sees its own document alone.
            Padding begins and ends at itself: it sees nothing, nothing sees it, and its output is
            zero. None is one document. Only for as many keys as queries.
        max_logits_N: fp32 [heads], raised in place, without waiting for the device, to the largest
            visible softmax_scale * Q K^T of each head, over the batch. Start it at -inf, where it
            stays if nothing is visible. Running the same call again, as activation recompute does,
            changes nothing. None where the maxima are not wanted.
        deterministic: whether gradients must have the same bits run to run.

    Returns:
        the output [sequence, batch, heads, value width] in the dtype of `value_SBGV`.

    Raises:
        RuntimeError: the backend cannot do this; the message names `kernels.backend`.
    """
    arguments = (query_SBNH, key_SBGH, value_SBGV, softmax_scale, causal)
    if query_SBNH.shape[0] != key_SBGH.shape[0]:
        if documents_2BS is not None:
            raise RuntimeError("documents are only for as many keys as queries")
        return plain_attention(*arguments, None, max_logits_N, deterministic)
    return _IMPLEMENTATIONS[backend](*arguments, documents_2BS, max_logits_N, deterministic)
