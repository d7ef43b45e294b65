"""Attention of this project and of those a user would pick instead, behind one signature.

What is not installed, or refuses a case, raises when it is built or called; nothing is imported
before. Shape suffixes: S sequence, B batch, N query heads, G key-value heads, H query-key width,
V value width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]
]
"""(query [S, B, N, H], key [S, B, G, H], value [S, B, G, V]) -> (output [S, B, N, V], largest
scaled logit of each head [N] or None), differentiable."""


@dataclass(frozen=True)
class Case:
    """Sizes and mask of one call.

    Attributes:
        scale: factor on the logits; None is the usual 1 / sqrt(width).
        documents: lengths of the documents of each sample, which fill it; None is one document.
    """

    length: int
    batch: int
    query_heads: int
    key_heads: int
    width: int
    value_width: int
    causal: bool = True
    scale: float | None = None
    documents: tuple[tuple[int, ...], ...] | None = None

    @property
    def softmax_scale(self) -> float:
        """The factor on the logits."""
        return float(self.width**-0.5) if self.scale is None else self.scale

    def segment_ids(self) -> torch.Tensor | None:
        """Number of each token's document: int32 [B, S] on the GPU, or None."""
        if self.documents is None:
            return None
        samples = [
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            for lengths in self.documents
        ]
        return torch.stack(samples).to("cuda", torch.int32)

    def cumulative_lengths(self) -> tuple[torch.Tensor, int]:
        """Boundaries of the documents, sample behind sample, int32 on the GPU, and the longest."""
        assert self.documents is not None
        lengths = [length for sample in self.documents for length in sample]
        boundaries = list(itertools.accumulate(lengths, initial=0))
        return torch.tensor(boundaries, device="cuda", dtype=torch.int32), max(lengths)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        build: makes what is timed, masks and modules included.
        batch_first: whether its tensors lie in memory as [B, S, heads, width], which is how it is
            used; they are handed over as [S, B, heads, width] all the same.
    """

    build: Callable[[Case], Attention]
    batch_first: bool = True


def ours(case: Case, *, with_max_logits: bool = True, deterministic: bool = False) -> Attention:
    """This project's kernels."""
    from megatron_kanana.kernels.attention import attention, documents_of

    segment_ids = case.segment_ids()
    documents = None if segment_ids is None else documents_of(segment_ids)
    maxima = torch.full((case.query_heads,), float("-inf"), device="cuda")
    largest = maxima if with_max_logits else None

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = attention(
            query,
            key,
            value,
            case.softmax_scale,
            backend="csrc",
            causal=case.causal,
            documents_2BS=documents,
            max_logits_N=largest,
            deterministic=deterministic,
        )
        return out, largest

    return run


def cudnn_flex(
    case: Case, *, with_max_logits: bool = True, deterministic: bool = False
) -> Attention:
    """cuDNN frontend's flex_attn_func, its mask plan made beforehand."""
    from cudnn.flex_attention import create_mask_plan, flex_attn_func

    positions = torch.arange(case.length, dtype=torch.int32, device="cuda")
    stop = positions + 1 if case.causal else torch.full_like(positions, case.length)
    ends = stop.expand(1, case.batch, case.length)
    if (segment_ids := case.segment_ids()) is not None:
        from megatron_kanana.kernels.attention import documents_of

        begin, end = documents_of(segment_ids)
        ends = torch.stack([torch.zeros_like(begin), begin, torch.minimum(end, stop)])
    sizes = [
        (case.query_heads, case.width),
        (case.key_heads, case.width),
        (case.key_heads, case.value_width),
    ]
    samples = [
        torch.empty(case.batch, case.length, *size, dtype=torch.bfloat16, device="cuda")
        for size in sizes
    ]
    plan = create_mask_plan(
        ends.reshape(1, -1, case.batch * case.length).contiguous(), *samples, build_backward=True
    )

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        result = flex_attn_func(
            *(tensor.transpose(0, 1) for tensor in (query, key, value)),
            mask_plan=plan,
            softmax_scale=case.softmax_scale,
            deterministic=deterministic,
            return_max_logit=with_max_logits,
        )
        out, maxima = result if with_max_logits else (result, None)
        return out.transpose(0, 1), maxima

    return run


def flash_attention_4(case: Case, *, deterministic: bool = False) -> Attention:
    """FlashAttention-4's CuTe kernels."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "deterministic": deterministic,
    }
    function = functools.partial(flash_attn_func, **options)
    if case.documents is not None:
        boundaries, longest = case.cumulative_lengths()
        function = functools.partial(
            flash_attn_varlen_func,
            cu_seqlens_q=boundaries,
            cu_seqlens_k=boundaries,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **options,
        )

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        tensors = [tensor.transpose(0, 1) for tensor in (query, key, value)]
        if case.documents is not None:
            tensors = [tensor.flatten(0, 1) for tensor in tensors]
        result = function(*tensors)
        out = result[0] if isinstance(result, tuple) else result
        return out.view(case.batch, case.length, *out.shape[-2:]).transpose(0, 1), None

    return run


def transformer_engine(case: Case, *, with_max_logits: bool = True) -> Attention:
    """Transformer Engine's DotProductAttention, which chooses cuDNN on Hopper."""
    from transformer_engine.pytorch import DotProductAttention

    mask = "causal" if case.causal else "no_mask"
    packed: dict[str, Any] = {}
    if case.documents is not None:
        mask = "padding_causal" if case.causal else "padding"
        boundaries, longest = case.cumulative_lengths()
        packed = {
            "cu_seqlens_q": boundaries,
            "cu_seqlens_kv": boundaries,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }
    module = DotProductAttention(
        case.query_heads,
        (case.width, case.value_width),
        num_gqa_groups=case.key_heads,
        qkv_format="thd" if packed else "sbhd",
        attn_mask_type=mask,
        softmax_scale=case.softmax_scale,
        return_max_logit=with_max_logits,
    )

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tensors = [query, key, value]
        if packed:
            tensors = [tensor.transpose(0, 1).flatten(0, 1) for tensor in tensors]
        result = module(*tensors, **packed)
        out, maxima = result if with_max_logits else (result, None)
        shape = (case.query_heads, case.value_width)
        if packed:
            return out.view(case.batch, case.length, *shape).transpose(0, 1), maxima
        return out.view(case.length, case.batch, *shape), maxima

    return run


def sdpa_cudnn(case: Case) -> Attention:
    """torch's scaled_dot_product_attention through cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.documents is not None:  # what the peer lacks: told as not run
        raise NotImplementedError("documents need a mask of sequence by sequence")

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                is_causal=case.causal,
                scale=case.softmax_scale,
                enable_gqa=case.query_heads != case.key_heads,
            )
        return out.permute(2, 0, 1, 3), None

    return run


OURS = "ours"
OURS_PLAIN = "ours without max logits"
OURS_DETERMINISTIC = "ours, deterministic"
FLEX = "cuDNN frontend flex_attn_func with max logits"
FLEX_PLAIN = "cuDNN frontend flex_attn_func"
FLEX_DETERMINISTIC = "cuDNN frontend flex_attn_func, deterministic"
FA4 = "FlashAttention-4"
FA4_DETERMINISTIC = "FlashAttention-4, deterministic"
TE = "Transformer Engine with max logits"
TE_PLAIN = "Transformer Engine"
SDPA = "torch SDPA, cuDNN"

CONTENDERS = {
    OURS: Contender(ours, batch_first=False),
    OURS_PLAIN: Contender(functools.partial(ours, with_max_logits=False), batch_first=False),
    OURS_DETERMINISTIC: Contender(functools.partial(ours, deterministic=True), batch_first=False),
    FLEX: Contender(cudnn_flex),
    FLEX_PLAIN: Contender(functools.partial(cudnn_flex, with_max_logits=False)),
    FLEX_DETERMINISTIC: Contender(functools.partial(cudnn_flex, deterministic=True)),
    FA4: Contender(flash_attention_4),
    FA4_DETERMINISTIC: Contender(functools.partial(flash_attention_4, deterministic=True)),
    TE: Contender(transformer_engine, batch_first=False),
    TE_PLAIN: Contender(
        functools.partial(transformer_engine, with_max_logits=False), batch_first=False
    ),
    SDPA: Contender(sdpa_cudnn),
}


@dataclass
class Inputs:
    """Tensors of a case, [S, B, heads, width] bf16 on the GPU; gradients are asked for."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What gradients are taken of."""
        return self.query, self.key, self.value

    def laid_out(self, *, batch_first: bool) -> Inputs:
        """The same numbers with another order in memory, as new leaves."""

        def lay_out(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach()
            if batch_first:
                return tensor.transpose(0, 1).contiguous().transpose(0, 1)
            return tensor.contiguous()

        query, key, value = (lay_out(leaf).requires_grad_() for leaf in self.leaves)
        return Inputs(query, key, value, lay_out(self.grad_out))


def random_inputs(case: Case, seed: int = 0) -> Inputs:
    """Normal random numbers, [S, B, heads, width] in memory too."""
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = [
        (case.query_heads, case.width),
        (case.key_heads, case.width),
        (case.key_heads, case.value_width),
        (case.query_heads, case.value_width),
    ]
    tensors = [
        torch.randn(case.length, case.batch, *size, generator=generator, device="cuda").bfloat16()
        for size in sizes
    ]
    return Inputs(*tensors).laid_out(batch_first=False)
