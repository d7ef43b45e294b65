"""Causal attention that also returns each head's largest logit, which QK-Clip needs.

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

    Returns:
        the output [sequence, batch, heads, value width] in the dtype of `value_SBNV`, and the
        maxima over batch, query and visible key, [heads] in fp32 without gradient, or None.
    """
    implementations = {"torch": _torch_attention, "csrc": _csrc_attention, "sdpa": _sdpa_attention}
    implementation = implementations[backend]
    if query_SBNH.shape[0] != key_SBNH.shape[0]:
        implementation = _torch_attention
    return implementation(query_SBNH, key_SBNH, value_SBNV, softmax_scale, with_max_logits)


def _torch_attention(
    query_SBNH: torch.Tensor,
    key_TBNH: torch.Tensor,
    value_TBNV: torch.Tensor,
    softmax_scale: float,
    with_max_logits: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    queries, keys = query_SBNH.shape[0], key_TBNH.shape[0]
    query_BNSH, key_BNTH = query_SBNH.permute(1, 2, 0, 3), key_TBNH.permute(1, 2, 0, 3)
    logits_BNST = torch.matmul(query_BNSH.float(), key_BNTH.float().mT) * softmax_scale
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=query_SBNH.device)
    logits_BNST = logits_BNST.masked_fill(hidden.triu(1 + keys - queries), float("-inf"))
    max_logits_N = logits_BNST.detach().amax(dim=(0, 2, 3)) if with_max_logits else None
    value_BNTV = value_TBNV.permute(1, 2, 0, 3)
    out_BNSV = torch.matmul(logits_BNST.softmax(-1), value_BNTV.float()).to(value_TBNV.dtype)
    return out_BNSV.permute(2, 0, 1, 3), max_logits_N


def _csrc_attention(
    query_SBNH: torch.Tensor,
    key_SBNH: torch.Tensor,
    value_SBNV: torch.Tensor,
    softmax_scale: float,
    with_max_logits: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out_SBNV, max_logits_N = _CsrcAttention.apply(query_SBNH, key_SBNH, value_SBNV, softmax_scale)
    return out_SBNV, max_logits_N if with_max_logits else None


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, batch, heads, _ = query_SBNH.shape
        query_MSH, key_MSH, value_MSV = map(_matrices, (query_SBNH, key_SBNH, value_SBNV))
        probabilities_MSS = torch.bmm(query_MSH, key_MSH.mT)
        max_logits_M = torch.ops.megatron_kanana.causal_softmax_(probabilities_MSS, softmax_scale)
        out_MSV = torch.bmm(probabilities_MSS, value_MSV)
        ctx.save_for_backward(query_MSH, key_MSH, value_MSV, probabilities_MSS)
        ctx.softmax_scale, ctx.batch, ctx.dtype = softmax_scale, batch, value_SBNV.dtype
        max_logits_N = max_logits_M.view(batch, heads).amax(0)
        ctx.mark_non_differentiable(max_logits_N)
        return _heads(out_MSV, batch, value_SBNV.dtype), max_logits_N

    @staticmethod
    def backward(
        ctx: Any, grad_out_SBNV: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query_MSH, key_MSH, value_MSV, probabilities_MSS = ctx.saved_tensors
        grad_out_MSV = _matrices(grad_out_SBNV)
        grad_value_MSV = torch.bmm(probabilities_MSS.mT, grad_out_MSV)
        grad_MSS = torch.bmm(grad_out_MSV, value_MSV.mT)
        torch.ops.megatron_kanana.causal_softmax_backward_(
            grad_MSS, probabilities_MSS, ctx.softmax_scale
        )
        grads = (torch.bmm(grad_MSS, key_MSH), torch.bmm(grad_MSS.mT, query_MSH), grad_value_MSV)
        query, key, value = (_heads(grad, ctx.batch, ctx.dtype) for grad in grads)
        return query, key, value, None


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    query_BNSH, key_BNSH, value_BNSV = (
        tensor.permute(1, 2, 0, 3) for tensor in (query_SBNH, key_SBNH, value_SBNV)
    )
    out_BNSV = F.scaled_dot_product_attention(
        query_BNSH, key_BNSH, value_BNSV, is_causal=True, scale=softmax_scale
    )
    max_logits_N = (
        _causal_max_logits(query_BNSH.detach(), key_BNSH.detach(), softmax_scale)
        if with_max_logits
        else None
    )
    return out_BNSV.permute(2, 0, 1, 3), max_logits_N


def _causal_max_logits(
    query_BNSH: torch.Tensor, key_BNSH: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Largest visible logit of each head, a block of query rows at a time."""
    length = query_BNSH.shape[2]
    maxima = []
    for start in range(0, length, SDPA_MAX_LOGIT_ROWS):
        stop = min(start + SDPA_MAX_LOGIT_ROWS, length)
        logits = torch.matmul(query_BNSH[:, :, start:stop], key_BNSH[:, :, :stop].mT).float()
        hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=logits.device)
        logits.masked_fill_(hidden.triu(start + 1), float("-inf"))
        maxima.append(logits.amax(dim=(0, 2, 3)))
    return torch.stack(maxima).amax(0) * softmax_scale
