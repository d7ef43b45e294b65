"""The order of rows by expert: both backends against a sort of Python's."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_kanana.kernels.moe import permutation_of
from megatron_kanana.kernels.native import native_library_error

from .moe_reference import LOADS, random_experts

assert native_library_error() is None

BACKENDS = ["csrc", "torch"]


def check_permutation(chosen: torch.Tensor, num_experts: int, backend: str) -> None:
    """Compare with the slots in Python's stable order of experts."""
    flat = chosen.flatten().tolist()
    order = sorted((slot for slot, e in enumerate(flat) if e >= 0), key=lambda slot: flat[slot])
    permutation = permutation_of(chosen, num_experts, len(order), backend=backend)
    for tensor in vars(permutation).values():
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert permutation.slot_of_row_M.tolist() == order
    counts = [flat.count(expert) for expert in range(num_experts)]
    assert permutation.offsets_E1.diff().tolist() == counts
    assert permutation.offsets_E1[0] == 0
    rows = [-1] * len(flat)
    for row, slot in enumerate(order):
        rows[slot] = row
    assert permutation.row_of_slot_TK.shape == chosen.shape
    assert permutation.row_of_slot_TK.flatten().tolist() == rows


@pytest.mark.parametrize("tokens", [0, 1, 100])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_sorted_by_expert_and_then_by_token(backend: str, load: str, tokens: int) -> None:
    for slots, experts in [(4, 16), (6, 128), (1, 2)]:
        generator = torch.Generator().manual_seed(tokens + slots)
        chosen = random_experts(load, tokens, min(slots, experts // 2), experts, generator)
        check_permutation(chosen, experts, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_slot_may_have_a_row(backend: str) -> None:
    check_permutation(torch.full((5, 2), -1, dtype=torch.int32), 3, backend)


def test_a_permutation_compiles() -> None:
    chosen = random_experts("elsewhere", 20, 3, 8, torch.Generator().manual_seed(0))
    rows = int((chosen >= 0).sum())

    def offsets(chosen: torch.Tensor) -> torch.Tensor:
        return permutation_of(chosen, 8, rows, backend="csrc").offsets_E1 + 1

    compiled = torch.compile(offsets, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(chosen), offsets(chosen))


@pytest.mark.parametrize(
    ("chosen", "num_experts", "num_rows", "message"),
    [
        ([[0, 4]], 4, 2, "experts must have numbers from -1 to 3, got 4 at place 1"),
        ([[0, -2]], 4, 2, "experts must have numbers from -1 to 3, got -2 at place 1"),
        ([[0, -1]], 4, 2, "num_rows must be the number of slots that are not -1, 1, got 2"),
        ([[0, 1]], 4, 3, "num_rows must be from 0 to the 2 slots, got 3"),
        ([[0, 1]], 0, 2, "num_experts must be positive, got 0"),
        ([0, 1], 4, 2, "experts must have shape [tokens, experts a token], got [2]"),
    ],
)
def test_wrong_inputs_are_refused_by_name(
    chosen: list[list[int]], num_experts: int, num_rows: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        permutation_of(torch.tensor(chosen).int(), num_experts, num_rows, backend="csrc")


def test_experts_of_another_dtype_are_refused() -> None:
    with pytest.raises(RuntimeError, match="experts must be Int, got Long"):
        permutation_of(torch.zeros(1, 1, dtype=torch.long), 1, 1, backend="csrc")
