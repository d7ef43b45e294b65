"""When fp8 copies of weights are made: the quantisation itself runs on a GPU alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_kanana.kernels.moe.fp8 import QuantizedWeights
from megatron_kanana.model import quantized_weights
from megatron_kanana.model.quantized_weights import WeightCopies


@pytest.fixture
def module() -> Any:
    """With the flags of a module of megatron-core's."""
    module: Any = torch.nn.Module()
    module.is_first_microbatch = True
    return module


@pytest.fixture(autouse=True)
def _quantised_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(weight: torch.Tensor) -> QuantizedWeights:
        return QuantizedWeights(weight.clone(), weight.mT.clone(), weight.new_ones(1, 1, 1))

    monkeypatch.setattr(quantized_weights, "quantize_weights", copy)


def test_copies_are_made_anew_when_weights_may_have_changed_and_kept_between(module: Any) -> None:
    weights = [torch.randn(2, 4, 3), torch.randn(2, 3, 2)]
    copies = WeightCopies()
    first = copies.for_forward(module, weights).copies
    for found, weight in zip(first, weights, strict=True):
        assert torch.equal(found.data, weight)
    weights[0].add_(1.0)
    assert copies.for_forward(module, weights).copies is first
    module.is_first_microbatch = True
    again = copies.for_forward(module, weights).copies
    assert torch.equal(again[0].transposed, weights[0].mT)
    assert not torch.equal(first[0].data, again[0].data)


def test_a_modules_forward_in_training_makes_copies_once_a_step_and_in_evaluation_always(
    module: Any,
) -> None:
    copies, weights = WeightCopies(), [torch.randn(1, 2, 2)]
    found = []
    for first, training in ((True, True), (False, True), (True, True), (False, False)):
        module.is_first_microbatch = first
        module.train(training)
        found.append(copies.for_forward(module, weights).copies)
        assert not module.is_first_microbatch
    assert found[0] is found[1]
    assert len({id(each) for each in found}) == 3


def test_gradients_are_zero_at_a_steps_first_microbatch_of_training_alone(module: Any) -> None:
    copies, weights = WeightCopies(), [torch.randn(1, 2, 2)]
    found = []
    for first, training in ((True, True), (False, True), (True, False), (True, True)):
        module.is_first_microbatch = first
        module.train(training)
        found.append(copies.for_forward(module, weights).sums_are_zero)
    assert found == [True, False, False, True]
