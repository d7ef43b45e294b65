"""Causal attention that also returns each head's largest logit, which QK-Clip needs.

Where several documents share a sequence, a token sees those of its own document alone.

Shape suffixes: S sequence, T keys where they are more than the queries, B batch, N heads,
H query-key width, V value width, M = B*N matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

SDPA_MAX_LOGIT_ROWS = 1024  # query rows whose logits are held at once


def causal_attention(
    query_SBNH: torch.Tensor,
    key_SBNH: torch.Tensor,
    value_SBNV: torch.Tensor,
    softmax_scale: float,
    *,
    backend: str,
    with_max_logits: bool,
    segment_ids_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scale * Q K^T + causal mask) V, and each head's largest visible scale * Q K^T.

    With more keys than queries, as when a text is continued from a cache, the queries are the last
    positions. All backends then take the plain implementation: such calls have few queries.

    Args:
        query_SBNH, key_SBNH: [sequence, batch, heads, query-key width], any float dtype.
        value_SBNV: [sequence, batch, heads, value width]; the widths may differ.
        softmax_scale: factor on the logits.
        backend: 'torch' (the reference), 'csrc' (compiled, CPU) or 'sdpa' (fused, CUDA).
        with_max_logits: whether the maxima are wanted.
        segment_ids_BS: int [batch, sequence], documents numbered from 0 in the order in which they
            lie, padding -1; a token sees only its own document, padding only padding. None is one
            document. Only for as many keys as queries.

    Returns:
        the output [sequence, batch, heads, value width] in the dtype of `value_SBNV`, and the
        maxima over batch, query that is no padding and visible key, [heads] in fp32 without
        gradient, or None; -inf where all is padding.
    """
    implementations = {"torch": _torch_attention, "csrc": _csrc_attention, "sdpa": _sdpa_attention}
    implementation = implementations[backend]
    if query_SBNH.shape[0] != key_SBNH.shape[0]:
        assert segment_ids_BS is None
        implementation = _torch_attention
    return implementation(
        query_SBNH, key_SBNH, value_SBNV, softmax_scale, with_max_logits, segment_ids_BS
    )


def first_keys(segment_ids_BS: torch.Tensor) -> torch.Tensor:
    """Position of the first token of each token's document: int32 [batch, sequence]."""
    positions_S = torch.arange(segment_ids_BS.shape[1], device=segment_ids_BS.device)
    begins_BS = segment_ids_BS.diff(dim=1, prepend=segment_ids_BS[:, :1] - 1) != 0
    return torch.where(begins_BS, positions_S, 0).cummax(dim=1).values.to(torch.int32)


def _visible(segment_ids_BS: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Keys before `stop` that queries from `start` to `stop` see: bool [B, 1, queries, keys]."""
    queries_BS, keys_BT = segment_ids_BS[:, start:stop], segment_ids_BS[:, :stop]
    same_BST = queries_BS[:, :, None] == keys_BT[:, None, :]
    return same_BST.tril(start)[:, None]


def _torch_attention(
    query_SBNH: torch.Tensor,
    key_TBNH: torch.Tensor,
    value_TBNV: torch.Tensor,
    softmax_scale: float,
    with_max_logits: bool,
    segment_ids_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    queries, keys = query_SBNH.shape[0], key_TBNH.shape[0]
    query_BNSH, key_BNTH = query_SBNH.permute(1, 2, 0, 3), key_TBNH.permute(1, 2, 0, 3)
    logits_BNST = torch.matmul(query_BNSH.float(), key_BNTH.float().mT) * softmax_scale
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=query_SBNH.device)
    logits_BNST = logits_BNST.masked_fill(hidden.triu(1 + keys - queries), float("-inf"))
    if segment_ids_BS is not None:
        logits_BNST = logits_BNST.masked_fill(~_visible(segment_ids_BS, 0, keys), float("-inf"))
    max_logits_N = None
    if with_max_logits:
        max_logits_N = _head_maxima(logits_BNST.detach().amax(dim=3), segment_ids_BS)
    value_BNTV = value_TBNV.permute(1, 2, 0, 3)
    out_BNSV = torch.matmul(logits_BNST.softmax(-1), value_BNTV.float()).to(value_TBNV.dtype)
    return out_BNSV.permute(2, 0, 1, 3), max_logits_N


def _head_maxima(maxima_BNS: torch.Tensor, segment_ids_BS: torch.Tensor | None) -> torch.Tensor:
    """The queries' maxima to those of the heads, [N], padding left out."""
    if segment_ids_BS is not None:
        maxima_BNS = maxima_BNS.masked_fill((segment_ids_BS < 0)[:, None], float("-inf"))
    return maxima_BNS.amax(dim=(0, 2))


def _csrc_attention(
    query_SBNH: torch.Tensor,
    key_SBNH: torch.Tensor,
    value_SBNV: torch.Tensor,
    softmax_scale: float,
    with_max_logits: bool,
    segment_ids_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    first_BS = None if segment_ids_BS is None else first_keys(segment_ids_BS)
    out_SBNV, maxima_BNS = _CsrcAttention.apply(
        query_SBNH, key_SBNH, value_SBNV, softmax_scale, first_BS
    )
    return out_SBNV, _head_maxima(maxima_BNS, segment_ids_BS) if with_max_logits else None


def _matrices(tensor_SBNX: torch.Tensor) -> torch.Tensor:
    """[S, B, N, X] -> contiguous fp32 [B*N, S, X]."""
    length, batch, heads, width = tensor_SBNX.shape
    return tensor_SBNX.permute(1, 2, 0, 3).reshape(batch * heads, length, width).float()


class _CsrcAttention(torch.autograd.Function):
    """Matrix products by torch, the causal softmax and its gradient by csrc/cpu/causal_softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        query_SBNH: torch.Tensor,
        key_SBNH: torch.Tensor,
        value_SBNV: torch.Tensor,
        softmax_scale: float,
        first_keys_BS: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length, batch, heads, _ = query_SBNH.shape
        query_MSH, key_MSH, value_MSV = map(_matrices, (query_SBNH, key_SBNH, value_SBNV))
        probabilities_MSS = torch.bmm(query_MSH, key_MSH.mT)
        maxima_MS = torch.ops.megatron_kanana.causal_softmax_(
            probabilities_MSS, softmax_scale, first_keys_BS
        )
        out_MSV = torch.bmm(probabilities_MSS, value_MSV)
        ctx.save_for_backward(query_MSH, key_MSH, value_MSV, probabilities_MSS)
        ctx.softmax_scale, ctx.batch, ctx.dtype = softmax_scale, batch, value_SBNV.dtype
        maxima_BNS = maxima_MS.view(batch, heads, length)
        ctx.mark_non_differentiable(maxima_BNS)
        return _heads(out_MSV, batch, value_SBNV.dtype), maxima_BNS

    @staticmethod
    def backward(
        ctx: Any, grad_out_SBNV: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query_MSH, key_MSH, value_MSV, probabilities_MSS = ctx.saved_tensors
        grad_out_MSV = _matrices(grad_out_SBNV)
        grad_value_MSV = torch.bmm(probabilities_MSS.mT, grad_out_MSV)
        grad_MSS = torch.bmm(grad_out_MSV, value_MSV.mT)
        torch.ops.megatron_kanana.causal_softmax_backward_(
            grad_MSS, probabilities_MSS, ctx.softmax_scale
        )
        grads = (torch.bmm(grad_MSS, key_MSH), torch.bmm(grad_MSS.mT, query_MSH), grad_value_MSV)
        query, key, value = (_heads(grad, ctx.batch, ctx.dtype) for grad in grads)
        return query, key, value, None, None


def _heads(tensor_MSX: torch.Tensor, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """[B*N, S, X] -> [S, B, N, X]."""
    matrices, length, width = tensor_MSX.shape
    by_head = tensor_MSX.view(batch, matrices // batch, length, width)
    return by_head.permute(2, 0, 1, 3).to(dtype)


def _sdpa_attention(
    query_SBNH: torch.Tensor,
    key_SBNH: torch.Tensor,
    value_SBNV: torch.Tensor,
    softmax_scale: float,
    with_max_logits: bool,
    segment_ids_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    query_BNSH, key_BNSH, value_BNSV = (
        tensor.permute(1, 2, 0, 3) for tensor in (query_SBNH, key_SBNH, value_SBNV)
    )
    length = query_SBNH.shape[0]
    out_BNSV = F.scaled_dot_product_attention(
        query_BNSH,
        key_BNSH,
        value_BNSV,
        attn_mask=None if segment_ids_BS is None else _visible(segment_ids_BS, 0, length),
        is_causal=segment_ids_BS is None,
        scale=softmax_scale,
    )
    max_logits_N = (
        _causal_max_logits(query_BNSH.detach(), key_BNSH.detach(), softmax_scale, segment_ids_BS)
        if with_max_logits
        else None
    )
    return out_BNSV.permute(2, 0, 1, 3), max_logits_N


def _causal_max_logits(
    query_BNSH: torch.Tensor,
    key_BNSH: torch.Tensor,
    softmax_scale: float,
    segment_ids_BS: torch.Tensor | None,
) -> torch.Tensor:
    """Largest visible logit of each head, a block of query rows at a time."""
    length = query_BNSH.shape[2]
    maxima = []
    for start in range(0, length, SDPA_MAX_LOGIT_ROWS):
        stop = min(start + SDPA_MAX_LOGIT_ROWS, length)
        logits = torch.matmul(query_BNSH[:, :, start:stop], key_BNSH[:, :, :stop].mT).float()
        hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=logits.device)
        logits.masked_fill_(hidden.triu(start + 1), float("-inf"))
        if segment_ids_BS is not None:
            logits.masked_fill_(~_visible(segment_ids_BS, start, stop), float("-inf"))
        maxima.append(logits.amax(dim=3))
    return _head_maxima(torch.cat(maxima, dim=2), segment_ids_BS) * softmax_scale
