"""When fp8 copies of weights are made: the quantisation itself runs on a GPU alone."""

from __future__ import annotations

from typing import Any

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


def test_a_modules_forward_in_training_makes_copies_once_a_step_and_in_evaluation_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Tensor] = []

    def copy(weight: torch.Tensor) -> QuantizedWeights:
        made.append(weight)
        return QuantizedWeights(weight, weight, weight)

    monkeypatch.setattr(quantized_weights, "quantize_weights", copy)
    module: Any = torch.nn.Module()
    module.is_first_microbatch = True
    copies, weights = WeightCopies(), [torch.randn(1, 2, 2)]
    counts = []
    for first, training in ((True, True), (False, True), (True, True), (False, False)):
        module.is_first_microbatch = first or module.is_first_microbatch
        module.train(training)
        copies.for_forward(module, weights)
        assert not module.is_first_microbatch
        counts.append(len(made))
    assert counts == [1, 1, 2, 3]
