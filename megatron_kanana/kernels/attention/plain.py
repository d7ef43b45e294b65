"""Attention in plain torch, all logits in memory: the reference."""

from __future__ import annotations

import torch

from .documents import hidden_keys


def plain_attention(
    query_SBNH: torch.Tensor,
    key_TBGH: torch.Tensor,
    value_TBGV: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    documents_2BS: torch.Tensor | None,
    max_logits_N: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    """See `attention`; computed in fp32, float64 in float64. Its sums always have one order."""
    queries, keys = query_SBNH.shape[0], key_TBGH.shape[0]
    wide = torch.promote_types(torch.float32, query_SBNH.dtype)
    query_BNSH = query_SBNH.permute(1, 2, 0, 3).to(wide)
    key_BNTH, value_BNTV = (
        for_each_query_head(tensor.permute(1, 2, 0, 3).to(wide), query_SBNH.shape[2])
        for tensor in (key_TBGH, value_TBGV)
    )
    hidden = hidden_keys(
        range(keys - queries, keys), keys, causal, documents_2BS, query_SBNH.device
    )
    logits_BNST = torch.matmul(query_BNSH, key_BNTH.mT) * softmax_scale
    logits_BNST = logits_BNST.masked_fill(hidden, float("-inf"))
    if max_logits_N is not None:
        raise_maxima(max_logits_N, logits_BNST.detach().amax((0, 2, 3)))
    # A row that sees nothing is NaN after the softmax; zero takes its place, and its gradient's.
    probabilities_BNST = logits_BNST.softmax(-1).masked_fill(hidden, 0.0)
    out_BNSV = torch.matmul(probabilities_BNST, value_BNTV).to(value_TBGV.dtype)
    return out_BNSV.permute(2, 0, 1, 3)


def for_each_query_head(tensor_BGTX: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Each key-value head as often as query heads use it, [batch, query heads, keys, width]."""
    repeats = query_heads // tensor_BGTX.shape[1]
    return tensor_BGTX if repeats == 1 else tensor_BGTX.repeat_interleave(repeats, dim=1)


def raise_maxima(max_logits_N: torch.Tensor, found_N: torch.Tensor) -> None:
    """max_logits = max(max_logits, found), in place."""
    max_logits_N.copy_(torch.maximum(max_logits_N, found_N.to(max_logits_N.dtype)))
