"""What a threshold decides, beside another run: heads QK-Clip scales down, biases of experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
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


def expert_loads(records: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """Tokens of each expert in the steps of some records: fp32 [steps, layers, experts]."""
    return torch.tensor([list(record["expert_loads"].values()) for record in records])


@dataclass(frozen=True)
class Sides:
    """On which side of a threshold numbers lie in two runs.

    Attributes:
        near: those so near to it that either side would be right, of the shape of the numbers.
        otherwise: how many of the others lie on another side.
    """

    near: torch.Tensor
    otherwise: int


def clipped_heads(
    ours: torch.Tensor, theirs: torch.Tensor, threshold: float, tolerance: float
) -> Sides:
    """Compare which heads were above the threshold of QK-Clip.

    Args:
        ours, theirs: largest logits, [steps, layers, heads] of the same steps.
        threshold: above which a head is scaled down.
        tolerance: of the logits, as `logit_difference` measures.
    """
    limit = torch.tensor(threshold)
    return _sides(ours > limit, theirs > limit, theirs - limit, tolerance * _scale(theirs))


def busy_experts(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> Sides:
    """Compare which experts had more tokens than the mean, or fewer: it moves their biases.

    Args:
        ours, theirs: tokens of the same steps, [steps, layers, experts].
        tolerance: of an expert's tokens.
    """
    of_mean = [loads - loads.mean(-1, keepdim=True) for loads in (ours, theirs)]
    return _sides(of_mean[0].sign(), of_mean[1].sign(), of_mean[1], torch.tensor(tolerance))


def _sides(
    ours: torch.Tensor, theirs: torch.Tensor, distances: torch.Tensor, tolerance: torch.Tensor
) -> Sides:
    near = distances.abs() <= tolerance
    return Sides(near, int(((ours != theirs) & ~near).sum()))


def _scale(logits: torch.Tensor) -> torch.Tensor:
    return logits.abs().amax(-1, keepdim=True).clamp(min=1e-12)
