"""Losses of an output layer in fp8 and their gradients, beside float64 with the same roundings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_kanana.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_kanana.kernels.linear_cross_entropy.fp8_products import (
    GRADIENT_OF_ONE,
    PIECE_MULTIPLE,
    PIECES,
)

CHUNK = PIECES * PIECE_MULTIPLE
"""Tokens of the smallest chunk that can have all its pieces."""
FACTOR = 0.37
"""Of the losses' weights, which the forward pass is not told."""


@dataclass(frozen=True)
class Problem:
    """Hidden states [tokens, hidden], weight [words, hidden], labels and losses' weights."""

    hidden_states: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Found:
    """Losses [tokens], and gradients of their weighted sum [tokens, hidden], [words, hidden]."""

    losses: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


def random_problem(tokens: int, hidden: int, words: int, device: str = "cpu") -> Problem:
    """In bf16; a third of the tokens do not count, and those of the first chunk count half."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(words, hidden, generator=generator) * 2 * hidden**-0.5
    weights = (torch.rand(tokens, generator=generator) < 0.7).float()
    weights[:CHUNK] *= 0.5
    return Problem(
        hidden_states.bfloat16().to(device),
        weight.bfloat16().to(device),
        torch.randint(words, (tokens,), generator=generator).to(device),
        weights.to(device),
    )


def in_fp8(problem: Problem, backend: str, *, known: bool) -> Found:
    """By `linear_cross_entropy`, whose weight has a sum of gradients that holds ones before."""
    inputs = problem.hidden_states.clone().requires_grad_()
    weight: Any = torch.nn.Parameter(problem.weight.clone())
    weight.main_grad = torch.ones_like(problem.weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    losses = linear_cross_entropy(
        inputs,
        weight,
        problem.labels,
        problem.weights if known else None,
        backend=backend,
        chunk_bytes=2 * CHUNK * len(problem.weight),
        fp8=True,
    )
    (losses * problem.weights * FACTOR).sum().backward()
    assert inputs.grad is not None
    return Found(losses.detach(), inputs.grad, weight.main_grad - 1)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """To e4m3 with one scale, in float64."""
    scale = 448 / values.float().abs().max()
    return ((values.float() * scale).to(torch.float8_e4m3fn).float() / scale).double()


def with_roundings(problem: Problem) -> Found:
    """As in fp8; hidden states and gradients have a scale for each chunk of tokens."""
    words, weight_q = len(problem.weight), rounded(problem.weight)
    losses, of_hidden, of_weight = [], [], torch.zeros_like(weight_q)
    for first in range(0, len(problem.labels), CHUNK):
        chunk = slice(first, first + CHUNK)
        labels, weights = problem.labels[chunk], problem.weights[chunk, None].double() * FACTOR
        rows = rounded(problem.hidden_states[chunk])
        logits = (rows @ weight_q.T).bfloat16().double()
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        gradient = (logits.softmax(1) - F.one_hot(labels, words)) * weights
        scale = GRADIENT_OF_ONE / weights.max()
        gradient_q = (gradient * scale).float().to(torch.float8_e5m2).double() / scale
        of_hidden.append(gradient_q @ weight_q)
        of_weight += gradient_q.T @ rows
    return Found(torch.cat(losses), torch.cat(of_hidden), of_weight)


def exact(problem: Problem) -> Found:
    """Without any rounding."""
    hidden, weight = (
        tensor.double().requires_grad_() for tensor in (problem.hidden_states, problem.weight)
    )
    losses = F.cross_entropy(hidden @ weight.T, problem.labels, reduction="none")
    (losses * problem.weights * FACTOR).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Found(losses.detach(), hidden.grad, weight.grad)


def assert_close(found: Found, problem: Problem, *, losses: float, gradients: float) -> None:
    """To float64 with the same roundings, and gradients to float64 without any.

    Args:
        found: in fp8.
        problem: of which.
        losses, gradients: largest distances from those with roundings, of their norms.
    """
    same, right = with_roundings(problem), exact(problem)
    for ours, theirs, tolerance in (
        (found.losses, same.losses, losses),
        (found.grad_hidden, same.grad_hidden, gradients),
        (found.grad_weight, same.grad_weight, gradients),
        (found.grad_hidden, right.grad_hidden, 0.08),
        (found.grad_weight, right.grad_weight, 0.08),
    ):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < tolerance
