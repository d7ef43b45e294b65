"""fp8 copies of a module's weights, made once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_kanana.kernels.moe.fp8 import QuantizedWeights, quantize_weights


class FirstMicrobatch(Protocol):
    """A module with the flag that megatron-core's schedules set at a step's first microbatch."""

    is_first_microbatch: bool
    training: bool


@dataclass(frozen=True)
class Fp8Step:
    """What a forward pass in fp8 takes beside its inputs.

    Attributes:
        copies: of the weights.
        sums_are_zero: whether nothing has been added to the weights' gradients in this step yet.
    """

    copies: list[QuantizedWeights]
    sums_are_zero: bool


class WeightCopies:
    """Copies for the microbatches of a step, between which weights do not change."""

    def __init__(self) -> None:
        self._kept: list[QuantizedWeights] = []

    def for_forward(self, module: FirstMicrobatch, weights: Sequence[torch.Tensor]) -> Fp8Step:
        """For a forward pass of the module whose `weights` they are, bf16 [experts, rows, columns].

        Beside megatron-core's schedules, which tell of a step's first microbatch, a module computes
        in evaluation alone; there nobody tells of changed weights. Backward passes come in the
        order of forward passes, so that the first one finds gradients that are zero.
        """
        is_first, module.is_first_microbatch = module.is_first_microbatch, False
        if is_first or not module.training or not self._kept:
            self._kept = [quantize_weights(weight) for weight in weights]
        return Fp8Step(self._kept, sums_are_zero=is_first and module.training)
