"""Output layers with their loss, by several implementations, from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_kanana.kernels.linear_cross_entropy import linear_cross_entropy

from .moe_peers import give_main_grads

OURS = "csrc"


@dataclass(frozen=True)
class Case:
    """Sizes of an output layer."""

    tokens: int
    hidden_size: int
    words: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, d {self.hidden_size}, {self.words} words"


@dataclass
class Inputs:
    """Tensors of a case; a tenth of the tokens does not count."""

    hidden_states_TD: torch.Tensor
    weight_VD: torch.Tensor
    labels_T: torch.Tensor
    weights_T: torch.Tensor


def random_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Normal hidden states, as after a norm, and logits with a standard deviation of one."""
    generator = torch.Generator(device).manual_seed(case.tokens)
    options: dict[str, Any] = {"generator": generator, "device": device}
    weight_VD = torch.randn(case.words, case.hidden_size, **options) * case.hidden_size**-0.5
    return Inputs(
        torch.randn(case.tokens, case.hidden_size, **options).to(dtype).requires_grad_(),
        weight_VD.to(dtype),
        torch.randint(case.words, (case.tokens,), **options),
        (torch.rand(case.tokens, **options) < 0.9).float(),
    )


Losses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Head(nn.Module):
    """A weight with an fp32 sum of gradients, and who computes its losses."""

    def __init__(self, inputs: Inputs, losses: Losses) -> None:
        super().__init__()
        self.weight = nn.Parameter(inputs.weight_VD.clone())
        self.losses = losses
        give_main_grads(self)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """Sum of the losses that count over their number."""
        losses_T = self.losses(
            inputs.hidden_states_TD, self.weight, inputs.labels_T, inputs.weights_T
        )
        mean: torch.Tensor = (losses_T * inputs.weights_T).sum() / inputs.weights_T.sum()
        return mean

    def step(self, inputs: Inputs) -> None:
        """Forward and backward passes; gradients of the weight stay in its sum."""
        self(inputs).backward()
        inputs.hidden_states_TD.grad = None


def ours(backend: str, *, weights_are_known: bool = True, fp8: bool = False) -> Losses:
    """This project's."""

    def losses(hidden: Any, weight: Any, labels: Any, weights: Any) -> torch.Tensor:
        known = weights if weights_are_known else None
        result: torch.Tensor = linear_cross_entropy(
            hidden, weight, labels, known, backend=backend, fp8=fp8
        )
        return result

    return losses


def contenders() -> Iterator[tuple[str, Callable[[], Losses]]]:
    """Names, and what gives their losses or raises where they cannot run."""
    yield OURS, lambda: ours("csrc")
    yield "csrc, weights not known", lambda: ours("csrc", weights_are_known=False)
    yield "csrc, products in fp8", lambda: ours("csrc", fp8=True)
    yield "torch backend", lambda: ours("torch")
    yield "F.linear + F.cross_entropy", lambda: _plain
    yield "megatron-core", _megatron
    yield "megatron-core, fused", _megatron_fused
    yield "Transformer Engine", _transformer_engine
    yield "Liger", _liger


def _plain(hidden: Any, weight: Any, labels: Any, _: Any) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def _megatron() -> Losses:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def losses(hidden: Any, weight: Any, labels: Any, _: Any) -> torch.Tensor:
        logits_T1V = F.linear(hidden, weight)[:, None]
        result: torch.Tensor = vocab_parallel_cross_entropy(logits_T1V, labels[:, None])
        return result.flatten()

    return losses


def _megatron_fused() -> Losses:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def losses(hidden: Any, weight: Any, labels: Any, _: Any) -> torch.Tensor:
        logits_T1V = F.linear(hidden, weight)[:, None]
        result: torch.Tensor = fused_vocab_parallel_cross_entropy(
            logits_T1V, labels[:, None], dist.group.WORLD
        )
        return result.flatten()

    return losses


def _transformer_engine() -> Losses:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def losses(hidden: Any, weight: Any, labels: Any, _: Any) -> torch.Tensor:
        logits_T1V = F.linear(hidden, weight)[:, None]
        result: torch.Tensor = parallel_cross_entropy(
            logits_T1V, labels[:, None], 0.0, False, dist.group.WORLD
        )
        return result.flatten()

    return losses


def _liger() -> Losses:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # Losses without a reduction have no gradient there; a mean of all tokens that count does.
    mean = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="mean")

    def losses(hidden: Any, weight: Any, labels: Any, weights: Any) -> torch.Tensor:
        result: torch.Tensor = mean(weight, hidden, labels.where(weights > 0, -100))
        return result.expand(len(labels))

    return losses
