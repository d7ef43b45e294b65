"""fp8 copies of a module's weights, made once a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_kanana.kernels.moe.fp8 import QuantizedWeights, quantize_weights


class FirstMicrobatch(Protocol):
    """A module with the flag that megatron-core's schedules set at a step's first microbatch."""

    is_first_microbatch: bool
    training: bool


class WeightCopies:
    """Copies for the microbatches of a step, between which weights do not change."""

    def __init__(self) -> None:
        self._kept: list[QuantizedWeights] = []

    def for_forward(
        self, module: FirstMicrobatch, weights: Sequence[torch.Tensor]
    ) -> list[QuantizedWeights]:
        """Copies for a forward pass of the module whose `weights` they are; see `of`.

        Beside megatron-core's schedules, which tell of a step's first microbatch, a module computes
        in evaluation alone; there nobody tells of changed weights.
        """
        copies = self.of(weights, anew=module.is_first_microbatch or not module.training)
        module.is_first_microbatch = False
        return copies

    def of(self, weights: Sequence[torch.Tensor], *, anew: bool) -> list[QuantizedWeights]:
        """Copies of `weights`, bf16 [experts, rows, columns] each.

        Args:
            anew: whether they may have changed since the copies that are kept were made.
        """
        if anew or not self._kept:
            self._kept = [quantize_weights(weight) for weight in weights]
        return self._kept
