"""Routed and shared experts in fp8 quantise the rows they have in common once, and nothing changes.

The quantisation itself runs on a GPU alone; a stand-in computes here.
"""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_kanana.kernels.moe.fp8 import Fp8Choices
from megatron_kanana.model.dispatcher import AllToAllDispatcher, LocalDispatcher
from megatron_kanana.model.moe_layer import ExpertLayer
from tests.launch import run_python

QUANTISATIONS = {
    "one_pass, bf16": (4, 2),
    "one_pass, fp8": (6, 3),
    "recomputed, bf16": (6, 3),
    "recomputed, fp8": (8, 4),
    "microbatches_in_flight, bf16": (12, 6),
    "microbatches_in_flight, fp8": (18, 9),
    "without_gradients, bf16": (2, 1),
    "without_gradients, fp8": (2, 1),
    "after_an_error, bf16": (5, 3),
    "after_an_error, fp8": (7, 4),
    "twice_backward, bf16": (6, 3),
    "twice_backward, fp8": (10, 5),
    "expanded_gradient, bf16": (4, 3),
    "expanded_gradient, fp8": (6, 4),
}
"""By case and format of the weights' gradients: without and with rows in common."""


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """What `tests.model.common_rows` says."""
    finished = run_python("-m", "tests.model.common_rows")
    assert finished.returncode == 0, finished.stderr
    result: dict[str, list[dict[str, Any]]] = json.loads(finished.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", QUANTISATIONS)
def test_results_have_the_same_bits_and_nothing_is_held_afterwards(
    case: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    without, with_common = found[case]
    quantisations = len(without["quantised"]), len(with_common["quantised"])
    assert quantisations == QUANTISATIONS[case]
    assert with_common["results"] == without["results"]
    assert with_common["held"] == 0


def test_both_find_the_same_rows_at_the_same_place_forward_and_backward(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    without, _ = found["one_pass, fp8"]
    places = Counter((address, whole) for address, whole in without["quantised"])
    assert list(places.values()) == [2, 2, 2]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"use_shared_expert": False, "shared_experts": None}, False),
        ({"token_dispatcher": AllToAllDispatcher.__new__(AllToAllDispatcher)}, False),
        ({"experts": SimpleNamespace(fp8=None)}, False),
        ({"experts": SimpleNamespace(fp8=Fp8Choices(weight_gradients=True))}, False),
    ],
)
def test_rows_are_in_common_where_all_experts_are_here_and_in_the_same_formats(
    changed: dict[str, Any], expected: bool
) -> None:
    assert ExpertLayer._experts_have_common_rows(layer(changed)) is expected


@pytest.mark.parametrize(("fp8", "processes"), [(None, 1), (Fp8Choices(), 2)])
def test_shared_experts_in_bf16_or_over_several_processes_have_rows_of_their_own(
    fp8: Fp8Choices | None, processes: int
) -> None:
    shared = SimpleNamespace(fp8=fp8, tp_group=SimpleNamespace(size=lambda: processes))
    assert not ExpertLayer._experts_have_common_rows(layer({"shared_experts": shared}))


def layer(changed: dict[str, Any]) -> Any:
    """One whose experts have rows in common, with these attributes changed."""
    one_process = SimpleNamespace(size=lambda: 1)
    attributes = {
        "use_shared_expert": True,
        "token_dispatcher": LocalDispatcher.__new__(LocalDispatcher),
        "shared_experts": SimpleNamespace(fp8=Fp8Choices(), tp_group=one_process),
        "experts": SimpleNamespace(fp8=Fp8Choices()),
    }
    return SimpleNamespace(**attributes | changed)
