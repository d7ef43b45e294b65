"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 always takes the largest.
        top_p: the most probable tokens are kept until their probabilities reach this sum
            (nucleus sampling, arXiv 1904.09751); 1 keeps all.
        seed: of the choices.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0


def next_token_probabilities(
    logits: torch.Tensor, sampling: Sampling, vocab_size: int, unused_ids: Sequence[int] = ()
) -> torch.Tensor:
    """Probability of each token to be chosen next.

    Args:
        logits: fp32 [padded vocabulary]; at equal logits the smaller id comes first.
        sampling: temperature and top-p.
        vocab_size: ids from here on stand for nothing and are never chosen.
        unused_ids: nor are these.

    Returns:
        fp32 [vocab_size] that sums to one.
    """
    logits = logits[:vocab_size].clone()
    logits[list(unused_ids)] = float("-inf")
    if sampling.temperature == 0:
        one_hot = torch.zeros_like(logits)
        one_hot[logits.argmax()] = 1.0
        return one_hot
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities[order[before >= sampling.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities
