"""What is said about loss curves, on curves that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.loss_curves import curve_rows, distance, plot_curves, spikes
from benchmarks.loss_parity import Batches

CURVES = {
    "ours, bf16": [3.0 - 0.01 * step for step in range(40)],
    "ours, bf16, another order": [3.002 - 0.01 * step for step in range(40)],
    "peer, bf16": [3.001 - 0.01 * step for step in range(40)],
}


def test_a_curve_is_told_beside_what_rounding_alone_does() -> None:
    rows = {row.name: row for row in curve_rows(CURVES, base="ours, bf16", noise="another order")}
    row = rows["peer, bf16: mean distance of curves"]
    assert row.peer == "rounding alone"
    assert row.ours == pytest.approx(0.001)
    assert row.peer_value == pytest.approx(0.002)
    assert row.ratio == pytest.approx(2.0)
    assert rows["ours, bf16, another order: mean distance of curves"].peer is None
    last = 3.0 - 0.01 * (20 + 39) / 2
    assert rows["ours, bf16: loss of the last 20 steps"].ours == pytest.approx(last)
    assert rows["peer, bf16: change of the final loss"].ours == pytest.approx(0.1 / last)


def test_a_spike_is_a_loss_a_tenth_above_the_ten_before() -> None:
    curve = [2.0] * 20 + [2.3] + [2.0] * 20
    assert spikes(curve) == 1
    assert spikes([2.19 if step % 2 else 2.0 for step in range(30)]) == 0


def test_both_orders_of_a_batch_hold_the_same_sequences_in_others_places() -> None:
    batches = Batches(torch.arange(10_000), sequences=16, microbatches=4, length=32)
    straight = [batch["tokens"] for batch in batches.draw(3, reordered=False)]
    other = [batch["tokens"] for batch in batches.draw(3, reordered=True)]
    assert len(straight) == 4
    assert sorted(torch.cat(straight)[:, 0].tolist()) == sorted(torch.cat(other)[:, 0].tolist())
    assert not torch.equal(torch.cat(straight), torch.cat(other))
    for batch in batches.draw(4, reordered=False):
        assert torch.equal(batch["labels"], batch["tokens"] + 1)


def test_the_plot_is_written(tmp_path: Path) -> None:
    plot_curves(CURVES, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert distance(CURVES["peer, bf16"], CURVES["ours, bf16"]) == pytest.approx(0.001)
