"""The benchmark of a step compares the same model: megatron-core's modules with our weights."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch import run_python


def test_ours_and_megatron_cores_modules_have_the_same_loss_and_gradients(tmp_path: Path) -> None:
    run = run_python(
        *("-m", "benchmarks.step", "--name", "step", "--output", str(tmp_path)),
        *("--model", "kanana_2_tiny", "--layers", "3", "--vocabulary", "4096"),
        *("--sequences", "2", "--sequence-length", "64", "--rounds", "2", "--repeats", "1"),
        *("--precisions", "fp32", "--peer-precisions", "fp32", "--compare-gradients"),
    )
    assert run.returncode == 0, run.stderr
    card = json.loads((tmp_path / "step.json").read_text())
    values = {row["name"]: row["ours"] for row in card["rows"]}
    assert "not run" not in " ".join(card["notes"])
    difference = values["2 x 64, megatron-core, fp32: largest difference of a gradient"]
    assert 0 < difference < 1e-5  # 0 would be a comparison with itself
    names = ("ours", "megatron-core")
    ours, megatron = (values[f"2 x 64, {name}, fp32: loss of the same tokens"] for name in names)
    assert abs(ours - megatron) < 1e-5
    assert all(values[f"2 x 64, {name}, fp32: step"] > 0 for name in names)
