"""Heads that QK-Clip scales down, beside those of another run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist


@contextlib.contextmanager
def recorded_logits(path: Path | None) -> Iterator[None]:
    """Inside, the largest attention logits of a training are noted; the first process writes them.

    Args:
        path: of a file for fp32 [steps, layers, heads]; None records nothing.
    """
    if path is None:
        yield
        return
    from megatron_kanana.training.attention_logits import AttentionLogits

    found: list[torch.Tensor] = []
    original = AttentionLogits.reduce

    def reduce(self: AttentionLogits) -> torch.Tensor:
        result = original(self)
        if dist.get_rank() == 0:
            found.append(result.clone())
        return result

    with mock.patch.object(AttentionLogits, "reduce", reduce):
        yield
    if found:
        torch.save(torch.stack(found), path)


def logit_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of a head's logit, over the largest logit of its layer in that step.

    Args:
        ours, theirs: [steps, layers, heads] of the same steps.
    """
    return float(((ours - theirs).abs() / _scale(theirs)).max())


@dataclass(frozen=True)
class ClippedHeads:
    """Heads above the threshold in two runs, each as often as it was.

    Attributes:
        near: whose logit is so near to the threshold that either would be right.
        otherwise: of the others, those that were above it in one run alone.
    """

    near: int
    otherwise: int


def clipped_heads(
    ours: torch.Tensor, theirs: torch.Tensor, threshold: float, tolerance: float
) -> ClippedHeads:
    """Compare which heads were above the threshold.

    Args:
        ours, theirs: largest logits, [steps, layers, heads] of the same steps.
        threshold: above which a head is scaled down.
        tolerance: of the logits, as `logit_difference` measures.
    """
    near = (theirs - threshold).abs() <= tolerance * _scale(theirs)
    otherwise = ((ours > threshold) != (theirs > threshold)) & ~near
    return ClippedHeads(int(near.sum()), int(otherwise.sum()))


def _scale(logits: torch.Tensor) -> torch.Tensor:
    return logits.abs().amax(-1, keepdim=True).clamp(min=1e-12)
