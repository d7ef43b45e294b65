"""The operations of csrc/: flash attention with its largest logits, for Hopper and for CPUs.

What is kept for the backward pass is query, key, value, output and one fp32 number a query and
head; nothing of sequence by sequence is in memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_kanana.native_library import HOPPER_ATTENTION_WIDTHS

from ..native import load_native_operations


def compiled_attention(
    query_SBNH: torch.Tensor,
    key_SBGH: torch.Tensor,
    value_SBGV: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    documents_2BS: torch.Tensor | None,
    max_logits_N: torch.Tensor | None,
    deterministic: bool,
) -> torch.Tensor:
    """See `attention`. fp32 or bf16 of any widths on a CPU, bf16 of some widths on CUDA."""
    _register()
    if query_SBNH.is_cuda:
        _check_cuda(query_SBNH, value_SBGV)
    out_SBNV: torch.Tensor = _FlashAttention.apply(
        query_SBNH,
        key_SBGH,
        value_SBGV,
        softmax_scale,
        causal,
        documents_2BS,
        max_logits_N,
        deterministic,
    )
    return out_SBNV


# torch.compile takes the function as it is, as it cannot trace the loading of a library, and traces
# the operations it calls.
torch.compiler.allow_in_graph(compiled_attention)


def _check_cuda(query: torch.Tensor, value: torch.Tensor) -> None:
    widths = (query.shape[-1], value.shape[-1])
    if query.dtype == torch.bfloat16 and widths in HOPPER_ATTENTION_WIDTHS:
        return
    raise RuntimeError(
        f"kernels.backend = csrc: on CUDA it takes bfloat16 and widths of query-key and value of "
        f"{', '.join(map(str, HOPPER_ATTENTION_WIDTHS))}, not {query.dtype} and {widths}; "
        "set kernels.backend=sdpa or torch"
    )


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_scale: float,
        causal: bool,
        documents: torch.Tensor | None,
        max_logits: torch.Tensor | None,
        deterministic: bool,
    ) -> torch.Tensor:
        query, key, value = _loadable(query), _loadable(key), _loadable(value)
        out, logsumexp = torch.ops.megatron_kanana.flash_attention_forward(
            query, key, value, softmax_scale, causal, documents, max_logits
        )
        ctx.save_for_backward(query, key, value, out, logsumexp, documents)
        ctx.options = (softmax_scale, causal, deterministic)
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, logsumexp, documents = ctx.saved_tensors
        softmax_scale, causal, deterministic = ctx.options
        grads = torch.ops.megatron_kanana.flash_attention_backward(
            _loadable(grad_out),
            query,
            key,
            value,
            out,
            logsumexp,
            softmax_scale,
            causal,
            documents,
            deterministic,
        )
        return (*grads, None, None, None, None, None)


def _loadable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a layout the kernels read: whole rows, on CUDA each at 16 bytes."""
    sizes_and_strides = list(zip(tensor.shape, tensor.stride(), strict=True))
    whole_rows = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    if not tensor.is_cuda:
        return tensor if whole_rows else tensor.contiguous()
    strides = [stride for size, stride in sizes_and_strides[:-1] if size > 1]
    aligned = tensor.storage_offset() % 8 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
    return tensor if whole_rows and aligned else tensor.contiguous()


@functools.cache
def _register() -> None:
    """Load the operations, and tell torch.compile the shapes they return."""
    load_native_operations()
    torch.library.register_fake("megatron_kanana::flash_attention_forward", _fake_forward)
    torch.library.register_fake("megatron_kanana::flash_attention_backward", _fake_backward)


def _fake_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    length, batch, heads, _ = query.shape
    out = value.new_empty(length, batch, heads, value.shape[-1])
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _fake_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
