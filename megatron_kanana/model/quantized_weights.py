"""fp8 copies of a module's weights, made once a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_kanana.kernels.moe.fp8 import QuantizedWeights, quantize_weights


class WeightCopies:
    """Copies for the microbatches of a step, between which weights do not change."""

    def __init__(self) -> None:
        self._kept: list[QuantizedWeights] = []

    def of(self, weights: Sequence[torch.Tensor], *, anew: bool) -> list[QuantizedWeights]:
        """Copies of `weights`, bf16 [experts, rows, columns] each.

        Args:
            anew: whether they may have changed since the copies that are kept were made.
        """
        if anew or not self._kept:
            self._kept = [quantize_weights(weight) for weight in weights]
        return self._kept
