"""Errors of attention on a CPU and of torch's against float64, over random draws of several inputs.

An error is of a whole tensor: root of the mean square, and largest, both over the root of the mean
square of the exact tensor. All get the same inputs; what is larger than a peer's by more than
chance, `error_draws.py` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_kanana.kernels.attention import attention, documents_of

from .card import Row
from .error_draws import Errors, compared, means_by_kind, summary

OURS = "ours"
NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")


@dataclass(frozen=True)
class ErrorCase:
    """One kind of input.

    Attributes:
        longest_document: documents are of 1 to so many tokens; None is one document.
        largest_logit: queries are scaled until the largest scaled logit is this.
        own_key: queries are their own key times this, beside little else, so that it gets most of
            the weight.
    """

    name: str
    length: int
    batch: int = 1
    heads: int = 4
    key_heads: int = 4
    width: int = 192
    value_width: int = 128
    causal: bool = True
    longest_document: int | None = None
    largest_logit: float | None = None
    own_key: float | None = None


CASES = (
    *(ErrorCase(f"{length} tokens", length, 8, 16, 16) for length in (1, 2, 3, 8)),
    *(ErrorCase(f"{length} tokens", length) for length in (17, 64, 129, 512, 1024, 2048)),
    *(ErrorCase(f"{length} tokens, no mask", length, causal=False) for length in (300, 1024)),
    *(
        ErrorCase(f"documents of at most {longest} tokens", 512, longest_document=longest)
        for longest in (1, 4, 20, 300)
    ),
    ErrorCase("documents, no mask", 512, causal=False, longest_document=300),
    ErrorCase("8 heads over 2", 512, heads=8, key_heads=2),
    ErrorCase("widths 128/128", 512, width=128),
    ErrorCase("widths 64/64", 512, width=64, value_width=64),
    ErrorCase("widths 48/32", 128, batch=8, width=48, value_width=32),
    *(
        ErrorCase(f"largest logit {largest:g}", 512, largest_logit=largest)
        for largest in (0.01, 1.0, 30.0, 300.0, 1e3, 1e4)
    ),
    ErrorCase("largest logit 300, no mask", 512, causal=False, largest_logit=300.0),
    *(ErrorCase(f"queries {own:g} times their keys", 512, own_key=own) for own in (1.0, 2.0)),
)


@dataclass
class Draw:
    """Inputs [batch, heads, sequence, width] and what is visible of one draw."""

    tensors: list[torch.Tensor]
    documents: torch.Tensor | None
    mask: torch.Tensor | None


def draw(case: ErrorCase, seed: int) -> Draw:
    """Normal random numbers, changed as the case wants them."""
    generator = torch.Generator().manual_seed(seed)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    widths = (case.width, case.width, case.value_width, case.value_width)
    tensors = [
        torch.randn(case.batch, count, case.length, width, generator=generator)
        for count, width in zip(heads, widths, strict=True)
    ]
    query, key = tensors[:2]
    keys = key.repeat_interleave(case.heads // case.key_heads, dim=1)
    if case.own_key is not None:
        query.mul_(0.1).add_(case.own_key * keys)
    if case.largest_logit is not None:
        query *= case.largest_logit / float((query @ keys.mT).abs().max() * case.width**-0.5)
    if case.longest_document is None:
        return Draw(tensors, None, None)
    sizes = (case.batch, case.length)  # more documents than have room
    lengths = torch.randint(1, case.longest_document + 1, sizes, generator=generator)
    starts = torch.zeros(case.batch, case.length + 1, dtype=torch.int64)
    starts.scatter_(1, lengths.cumsum(1).clamp_max(case.length), 1)
    segments = starts[:, :-1].cumsum(1)
    mask = (segments[:, :, None] == segments[:, None])[:, None]
    return Draw(tensors, documents_of(segments), mask.tril() if case.causal else mask)


def of_ours(case: ErrorCase, inputs: Draw, *tensors: torch.Tensor) -> torch.Tensor:
    """The compiled operation, from and to torch's layout."""
    query, key, value = (tensor.permute(2, 0, 1, 3) for tensor in tensors)
    out = attention(
        query,
        key,
        value,
        case.width**-0.5,
        backend="csrc",
        causal=case.causal,
        documents_2BS=inputs.documents,
    )
    return out.permute(1, 2, 0, 3)


def of_torch(
    backend: SDPBackend, case: ErrorCase, inputs: Draw, *tensors: torch.Tensor
) -> torch.Tensor:
    """One of the implementations of scaled_dot_product_attention."""
    query, key, value = tensors
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=inputs.mask,
            is_causal=case.causal and inputs.mask is None,
            enable_gqa=case.heads != case.key_heads,
        )


def results(
    case: ErrorCase, inputs: Draw, backend: SDPBackend | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients of query, key and value.

    Args:
        backend: torch's; None is ours.
    """
    *leaves, grad_out = (tensor.to(dtype, copy=True) for tensor in inputs.tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    if backend is None:
        out = of_ours(case, inputs, *leaves)
    else:
        out = of_torch(backend, case, inputs, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """By tensor and kind of error, as the head of this file defines them."""
    measured = {}
    for name, value, right in zip(NAMES, found, exact, strict=True):
        difference = value.double() - right
        size = float(right.square().mean().sqrt())
        size = size if size > 1e-30 else 1.0  # a gradient of zero: its error is measured as it is
        measured[f"{name}, rms error"] = float(difference.square().mean().sqrt()) / size
        measured[f"{name}, largest error"] = float(difference.abs().max()) / size
    return measured


def errors_of_draws(case: ErrorCase, peers: Mapping[str, SDPBackend], draws: int) -> list[Errors]:
    """Errors by contender of each draw; torch's flash path lacks widths that differ, and masks."""
    measured: list[Errors] = []
    for seed in range(draws):
        inputs = draw(case, seed)
        exact = results(case, inputs, SDPBackend.MATH, torch.float64)
        contenders: dict[str, SDPBackend | None] = {OURS: None}
        for name, backend in peers.items():
            if backend == SDPBackend.MATH or case.width == case.value_width:
                contenders[name] = backend
        measured.append(
            {
                name: errors(results(case, inputs, backend, torch.float32), exact)
                for name, backend in contenders.items()
            }
        )
    return measured


def error_rows(peers: Mapping[str, SDPBackend], draws: int) -> tuple[list[Row], list[str]]:
    """A row a case and kind of error, of means over the draws, beside the peer with the smallest.

    Returns:
        The rows, and notes: how many are larger than a peer's, and our error over each peer's with
        its 95 % interval, over all cases and of each.
    """
    found = {
        case.name: compared(f"errors: {case.name}", errors_of_draws(case, peers, draws), OURS)
        for case in CASES
    }
    everything = [result for of_case in found.values() for result in of_case]
    notes = summary(everything)
    for name, of_case in found.items():
        notes += [f"{name}: {note}" for note in means_by_kind(of_case)]
    return [result.row for result in everything], notes
