"""What is said about loss curves, on curves that can be worked out by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from benchmarks.loss_curves import curve_rows, plot_curves, spikes
from benchmarks.loss_parity import Batches


def falling(start: float) -> list[float]:
    """A curve of 40 steps."""
    return [start - 0.01 * step for step in range(40)]


RUNS = {
    "ours, bf16": [falling(3.0), falling(3.002), falling(3.004)],
    "peer, bf16": [falling(3.001), falling(3.001), falling(3.001)],
    "once": [falling(3.1)],
}
LAST = 0.01 * (20 + 39) / 2
"""What a curve has fallen by in the mean of its last 20 steps."""


def test_a_curve_is_told_beside_what_rounding_alone_does() -> None:
    rows = {row.name: row for row in curve_rows(RUNS, base="ours, bf16")}
    row = rows["peer, bf16: mean distance of curves"]
    assert row.peer == "rounding alone"
    assert row.ours == pytest.approx((0.001 + 0.001 + 0.003) / 3)
    assert row.peer_value == pytest.approx((0.002 + 0.002 + 0.004) / 3)
    assert "ours, bf16: mean distance of curves" not in rows


def test_means_of_final_losses_are_compared_beside_their_standard_errors() -> None:
    rows = {row.name: row for row in curve_rows(RUNS, base="ours, bf16")}
    base = 3.002 - LAST
    assert rows["ours, bf16: loss of the last 20 steps"].ours == pytest.approx(base)
    assert rows["ours, bf16: standard deviation of it"].ours == pytest.approx(100 * 0.002 / base)
    assert rows["peer, bf16: change of the final loss"].ours == pytest.approx(-100 * 0.001 / base)
    error = rows["peer, bf16: standard error of that change"].ours
    assert error == pytest.approx(100 * 0.002 / math.sqrt(3) / base)
    assert "once: standard error of that change" not in rows


def test_a_spike_is_a_loss_a_tenth_above_the_ten_before() -> None:
    curve = [2.0] * 20 + [2.3] + [2.0] * 20
    assert spikes(curve) == 1
    assert spikes([2.19 if step % 2 else 2.0 for step in range(30)]) == 0


def test_all_orders_of_a_batch_hold_the_same_sequences_in_other_places() -> None:
    batches = Batches(torch.arange(10_000), sequences=16, microbatches=4, length=32)
    orders = [torch.cat([b["tokens"] for b in batches.draw(3, order)]) for order in range(3)]
    for tokens, other in itertools.combinations(orders, 2):
        assert sorted(tokens[:, 0].tolist()) == sorted(other[:, 0].tolist())
        assert not torch.equal(tokens, other)
    assert len(list(batches.draw(3))) == 4
    for batch in batches.draw(4):
        assert torch.equal(batch["labels"], batch["tokens"] + 1)


def test_the_plot_is_written(tmp_path: Path) -> None:
    plot_curves(RUNS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
