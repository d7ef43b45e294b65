"""NVIDIA's cuDNN frontend: `flex_attn_func`, experimental there, which returns the largest logits.

Its mask is a plan made beforehand, with one wait for the device; a plan lives as long as the
documents it was made for, so the layers of a microbatch share one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .plain import raise_maxima

# Shapes of query, key and value with the batch first, dtype, device, and whether it is causal.
_Geometry = tuple[torch.Size, torch.Size, torch.Size, torch.dtype, torch.device, bool]

_plans: Any = WeakTensorKeyDictionary()


def cudnn_frontend_attention(
    query_SBNH: torch.Tensor,
    key_SBGH: torch.Tensor,
    value_SBGV: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    documents_2BS: torch.Tensor | None,
    max_logits_N: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    """See `attention`. bf16 or fp16 on Hopper and newer."""
    from cudnn.flex_attention import flex_attn_func

    query, key, value = (tensor.transpose(0, 1) for tensor in (query_SBNH, key_SBGH, value_SBGV))
    geometry = (query.shape, key.shape, value.shape, query.dtype, query.device, causal)
    try:
        if documents_2BS is None:
            plan = _plan_of_one_document(geometry)
        else:
            plans = _plans.setdefault(documents_2BS, {})
            if geometry not in plans:
                plans[geometry] = _make_plan(geometry, documents_2BS)
            plan = plans[geometry]
        found = flex_attn_func(
            query,
            key,
            value,
            mask_plan=plan,
            softmax_scale=softmax_scale,
            deterministic=deterministic,
            return_max_logit=max_logits_N is not None,
        )
    except (TypeError, ValueError, NotImplementedError) as error:  # what the library cannot take
        raise RuntimeError(f"kernels.backend = cudnn: {error}; set kernels.backend=auto") from error
    if max_logits_N is None:
        out_BSNV: torch.Tensor = found
    else:
        out_BSNV, found_N = found
        raise_maxima(max_logits_N, found_N)
    return out_BSNV.transpose(0, 1)


@functools.lru_cache(maxsize=16)
def _plan_of_one_document(geometry: _Geometry) -> Any:
    return _make_plan(geometry, None)


def _make_plan(geometry: _Geometry, documents_2BS: torch.Tensor | None) -> Any:
    """The plan of the intervals [begin, end) of keys that each query sees."""
    from cudnn.flex_attention import create_mask_plan

    *shapes, dtype, device, causal = geometry
    batch, length = shapes[0][:2]
    positions_S = torch.arange(length, dtype=torch.int32, device=device)
    stop_S = positions_S + 1 if causal else torch.full_like(positions_S, length)
    # The first interval begins at 0, so a document is the second, behind an empty one.
    ends = [stop_S.expand(batch, length)]
    if documents_2BS is not None:
        begin_BS = documents_2BS[0]
        end_BS = torch.minimum(documents_2BS[1], stop_S)
        ends = [torch.zeros_like(begin_BS), begin_BS, torch.maximum(begin_BS, end_BS)]
    intervals = torch.stack(ends).view(1, len(ends), batch * length).contiguous()
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    return create_mask_plan(intervals, *tensors, build_backward=True)
