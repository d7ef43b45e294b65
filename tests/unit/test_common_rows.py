"""When rows that two have in common are quantised: the quantisation itself runs on a GPU alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from megatron_kanana.kernels.moe.common_rows import CommonRows, QuantizedRows, RowsForTwo


class Quantizer:
    """Counts rows it is given; "quantises" by a copy.

    Attributes:
        calls: whether a row had one scale, by call.
        copies: what it gave out and somebody still holds.
    """

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self._copies: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, rows: torch.Tensor, whole: bool) -> QuantizedRows:
        self.calls.append(whole)
        copy = rows.clone()
        self._copies.append(weakref.ref(copy))
        return QuantizedRows(copy, torch.ones(len(rows), 1))

    @property
    def held(self) -> int:
        return sum(copy() is not None for copy in self._copies)


@pytest.fixture
def quantizer() -> Quantizer:
    return Quantizer()


@pytest.fixture
def rows_for_two(quantizer: Quantizer) -> RowsForTwo:
    return RowsForTwo(quantizer)


def test_the_same_rows_are_quantised_once_and_nothing_is_kept_after_the_second_use(
    quantizer: Quantizer, rows_for_two: RowsForTwo
) -> None:
    tensor = torch.randn(6, 2, 4)
    rows = weakref.ref(tensor.untyped_storage())
    first = rows_for_two.take(tensor.flatten(0, 1), whole=False)
    second = rows_for_two.take(tensor.view(12, 4), whole=False)
    assert second is first
    assert quantizer.calls == [False]
    del first, second, tensor
    assert quantizer.held == 0
    assert rows() is None


def test_a_third_use_is_the_first_of_two_again(
    quantizer: Quantizer, rows_for_two: RowsForTwo
) -> None:
    rows = torch.randn(3, 4)
    found = [rows_for_two.take(rows, whole=False) for _ in range(4)]
    assert found[0] is found[1]
    assert found[2] is found[3]
    assert len(quantizer.calls) == 2


def in_place(rows: torch.Tensor) -> torch.Tensor:
    """The same tensor with other numbers."""
    return rows.add_(1.0)


def in_place_through_a_view(rows: torch.Tensor) -> torch.Tensor:
    """The same tensor, of which another view is changed."""
    rows.view(-1)[0] = 7.0
    return rows


def behind_its_back(rows: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory, which has a version of its own."""
    other = rows.data
    rows.add_(1.0)
    return other


@pytest.mark.parametrize(
    "other",
    [
        in_place,
        in_place_through_a_view,
        behind_its_back,
        torch.clone,
        torch.t,
        lambda rows: rows[:2],
        lambda rows: rows.view(2, 8),
        lambda rows: rows.view(torch.int32),
    ],
)
def test_other_rows_are_quantised_and_those_kept_are_let_go(
    other: Callable[[torch.Tensor], torch.Tensor], quantizer: Quantizer, rows_for_two: RowsForTwo
) -> None:
    rows = torch.randn(4, 4)
    rows_for_two.take(rows, whole=False)
    changed = other(rows)
    found = rows_for_two.take(changed, whole=False)
    assert torch.equal(found.data, changed)
    assert len(quantizer.calls) == 2
    del found
    assert quantizer.held == 0
    first = rows_for_two.take(changed, whole=False)
    assert rows_for_two.take(changed, whole=False) is first


def test_rows_of_another_format_are_others(quantizer: Quantizer, rows_for_two: RowsForTwo) -> None:
    rows = torch.randn(4, 4)
    for whole in (False, True):
        rows_for_two.take(rows, whole=whole)
    assert quantizer.calls == [False, True]
    assert quantizer.held == 0


def test_rows_that_are_kept_leave_their_address_to_no_others(
    quantizer: Quantizer, rows_for_two: RowsForTwo
) -> None:
    """Memory that has just been freed is what the next tensor of its size gets on a CPU."""
    for turn in range(8):
        rows = torch.full((64, 64), float(turn))
        assert torch.equal(rows_for_two.take(rows, whole=False).data, rows)
        del rows
    assert len(quantizer.calls) == 8
    assert quantizer.held == 0


def test_an_error_leaves_nothing_behind(rows_for_two: RowsForTwo, quantizer: Quantizer) -> None:
    rows = torch.randn(4, 4)
    rows_for_two.take(rows, whole=False)

    def fail(rows: torch.Tensor, whole: bool) -> QuantizedRows:
        raise RuntimeError("no memory")

    rows_for_two._quantize = fail
    with pytest.raises(RuntimeError, match="no memory"):
        rows_for_two.take(rows + 1.0, whole=False)
    assert quantizer.held == 0


def test_tensors_of_inference_mode_whose_changes_nothing_tells_of_are_always_quantised(
    quantizer: Quantizer, rows_for_two: RowsForTwo
) -> None:
    with torch.inference_mode():
        rows = torch.randn(4, 4)
        for _ in range(2):
            assert torch.equal(rows_for_two.take(rows.mul_(2.0), whole=False).data, rows)
    assert len(quantizer.calls) == 2
    assert quantizer.held == 0


@pytest.mark.parametrize("weight_gradients", [False, True])
def test_forward_and_backward_quantise_what_each_takes_once_for_two(
    weight_gradients: bool, quantizer: Quantizer
) -> None:
    common, hidden_states, grad_out = CommonRows(quantizer), torch.randn(4, 8), torch.randn(4, 8)
    for _ in range(2):
        assert torch.equal(common.for_forward(hidden_states)[0], hidden_states)
    for _ in range(2):
        of_grad_out, _, *of_hidden_states = common.for_backward(
            grad_out, hidden_states, weight_gradients=weight_gradients
        )
        assert torch.equal(of_grad_out, grad_out)
        assert [torch.equal(each, hidden_states) for each in of_hidden_states[:1]] == (
            [True] if weight_gradients else []
        )
    assert quantizer.calls == ([False, True, True] if weight_gradients else [False, False])
    del of_grad_out, of_hidden_states
    assert quantizer.held == 0
