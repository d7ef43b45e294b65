"""Transformer Engine's attention. Its largest logits are rounded to the dtype of the output."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from .plain import raise_maxima


def transformer_engine_attention(
    query_SBNH: torch.Tensor,
    key_SBGH: torch.Tensor,
    value_SBGV: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    documents_2BS: torch.Tensor | None,
    max_logits_N: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    """See `attention`. No documents."""
    if documents_2BS is not None:
        raise RuntimeError(
            "kernels.backend = te: documents that share a sequence are not kept apart; "
            "set kernels.backend=auto"
        )
    if deterministic and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") != "0":
        raise RuntimeError(
            "kernels.backend = te: for kernels.deterministic=true set the environment variable "
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, or kernels.backend=auto"
        )
    module = _module(
        query_SBNH.shape[2],
        key_SBGH.shape[2],
        (query_SBNH.shape[3], value_SBGV.shape[3]),
        softmax_scale,
        causal,
        max_logits_N is not None,
    )
    out: torch.Tensor
    if max_logits_N is None:
        out = module(query_SBNH, key_SBGH, value_SBGV)
    else:
        out, found_N = module(query_SBNH, key_SBGH, value_SBGV)
        raise_maxima(max_logits_N, found_N.detach())
    return out.view(*query_SBNH.shape[:3], value_SBGV.shape[3])


@functools.cache
def _module(
    heads: int,
    key_value_heads: int,
    widths: tuple[int, int],
    softmax_scale: float,
    causal: bool,
    with_max_logits: bool,
) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        widths,
        num_gqa_groups=key_value_heads,
        qkv_format="sbhd",
        attn_mask_type="causal" if causal else "no_mask",
        softmax_scale=softmax_scale,
        return_max_logit=with_max_logits,
    )
