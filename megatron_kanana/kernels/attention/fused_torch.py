"""torch's fused attention, and the largest logits from a second product, a block at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .documents import hidden_keys
from .plain import for_each_query_head, raise_maxima

MAX_LOGIT_ROWS = 1024  # query rows whose logits are held at once


def fused_torch_attention(
    query_SBNH: torch.Tensor,
    key_SBGH: torch.Tensor,
    value_SBGV: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    documents_2BS: torch.Tensor | None,
    max_logits_N: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    """See `attention`. With documents, a mask of sequence by sequence is in memory."""
    if deterministic and query_SBNH.is_cuda:
        raise RuntimeError(
            "kernels.backend = sdpa: its gradients on CUDA are not deterministic; "
            "set kernels.backend=csrc, cudnn or torch, or kernels.deterministic=false"
        )
    length, device = query_SBNH.shape[0], query_SBNH.device
    query_BNSH, key_BGSH, value_BGSV = (
        tensor.permute(1, 2, 0, 3) for tensor in (query_SBNH, key_SBGH, value_SBGV)
    )
    visible, padding_BS = None, None
    if documents_2BS is not None:
        visible = ~hidden_keys(range(length), length, causal, documents_2BS, device)
        # Fused kernels differ on rows that see nothing: such a row sees itself, and is then zeroed.
        visible = visible | torch.eye(length, dtype=torch.bool, device=device)
        padding_BS = documents_2BS[0] == documents_2BS[1]
    out_BNSV = F.scaled_dot_product_attention(
        query_BNSH,
        key_BGSH,
        value_BGSV,
        attn_mask=visible,
        is_causal=causal and visible is None,
        scale=softmax_scale,
        enable_gqa=query_BNSH.shape[1] != key_BGSH.shape[1],
    )
    out_SBNV = out_BNSV.permute(2, 0, 1, 3)
    if padding_BS is not None:
        out_SBNV = out_SBNV.masked_fill(padding_BS.mT[:, :, None, None], 0.0)
    if max_logits_N is not None:
        with torch.no_grad():
            _raise_by_blocks(
                max_logits_N, query_BNSH, key_BGSH, softmax_scale, causal, documents_2BS
            )
    return out_SBNV


def _raise_by_blocks(
    max_logits_N: torch.Tensor,
    query_BNSH: torch.Tensor,
    key_BGSH: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    documents_2BS: torch.Tensor | None,
) -> None:
    length = query_BNSH.shape[2]
    key_BNSH = for_each_query_head(key_BGSH, query_BNSH.shape[1])
    for start in range(0, length, MAX_LOGIT_ROWS):
        stop = min(start + MAX_LOGIT_ROWS, length)
        seen = stop if causal else length
        logits = torch.matmul(query_BNSH[:, :, start:stop], key_BNSH[:, :, :seen].mT).float()
        hidden = hidden_keys(range(start, stop), seen, causal, documents_2BS, logits.device)
        logits.masked_fill_(hidden, float("-inf"))
        raise_maxima(max_logits_N, logits.amax((0, 2, 3)) * softmax_scale)
