"""When fp8 copies of weights are made: the quantisation itself runs on a GPU alone."""

from __future__ import annotations

import pytest
import torch

from megatron_kanana.kernels.moe.fp8 import QuantizedWeights
from megatron_kanana.model import quantized_weights
from megatron_kanana.model.quantized_weights import WeightCopies


def test_copies_are_made_anew_when_weights_may_have_changed_and_kept_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy(weight: torch.Tensor) -> QuantizedWeights:
        return QuantizedWeights(weight.clone(), weight.mT.clone(), weight.new_ones(1, 1, 1))

    monkeypatch.setattr(quantized_weights, "quantize_weights", copy)
    weights = [torch.randn(2, 4, 3), torch.randn(2, 3, 2)]
    copies = WeightCopies()
    first = copies.of(weights, anew=False)
    for found, weight in zip(first, weights, strict=True):
        assert torch.equal(found.data, weight)
    weights[0].add_(1.0)
    assert copies.of(weights, anew=False) is first
    again = copies.of(weights, anew=True)
    assert torch.equal(again[0].transposed, weights[0].mT)
    assert not torch.equal(first[0].data, again[0].data)
