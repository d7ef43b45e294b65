"""How far predictions are from what was measured: within limits, and as documented."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from benchmarks import planner_calibration as benchmark
from megatron_kanana.planning import own_cards
from megatron_kanana.planning.errors import Comparison, compare, fit_own, predict, predict_own
from megatron_kanana.planning.own_cards import OURS
from megatron_kanana.planning.report import TABLE_START, comparison_lines, with_table
from tests.launch import ROOT, run_python
from tools.plan import main

LIMITS = {
    "peak memory": 0.07,
    "activations": 0.07,
    "passes": 0.15,
    "step": 0.15,
    "update": 0.15,
    "memory between steps": 0.07,
    "throughput": 0.20,
}
BEYOND = {"DeepSeek-V3, 1024 H100, PP4 VP8 EP64 FSDP256, bf16"}
"""What docs/planning.md says is further off."""


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    """All of them."""
    return compare()


def test_predictions_are_within_the_limits(comparisons: list[Comparison]) -> None:
    measured = [each for each in comparisons if each.error is not None]
    assert len(measured) >= 30
    beyond = {
        each.observation.name
        for each in measured
        if abs(each.error or 0.0) > LIMITS[each.observation.quantity]
    }
    assert beyond == BEYOND


def test_documentation_has_the_table_of_the_command(comparisons: list[Comparison]) -> None:
    documented = (ROOT / "docs" / "planning.md").read_text()
    for line in comparison_lines(comparisons):
        if not line.startswith(("| ---", "| | |")):
            assert line.removesuffix("|").rstrip() in documented


def test_a_card_of_calibration_is_compared_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row with a prediction, under the setting that the benchmark names."""
    settings = [
        f"{precision}, attention csrc, recompute {again}"
        for precision in benchmark.PRECISIONS
        for again in benchmark.RECOMPUTE
    ]
    quantities = ("step", "passes", "peak memory", "memory between steps")
    rows = [
        {"name": f"{setting}: {quantity}", "ours": 1.0 + index}
        for index, (setting, quantity) in enumerate(itertools.product(settings, quantities))
    ]
    (tmp_path / "planner_calibration_h100.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(own_cards, "RESULTS", tmp_path)
    own_cards.card_rows.cache_clear()
    try:
        found = list(own_cards.of_calibration("h100"))
        assert not list(own_cards.of_calibration("b200"))
    finally:
        own_cards.card_rows.cache_clear()
    assert sorted(each.measured or 0.0 for each in found) == [row["ours"] for row in rows]
    for each in found:
        assert each.job.machine.name == "h100" and each.job.layout.microbatches == 4
        assert ("full" in each.name) == each.job.layout.has_full_recompute
        assert ("fp8_blockwise" in each.name) == ("query" in each.job.fp8)
        assert ("fp8_blockwise_experts" in each.name) == ("experts" in each.job.fp8)


def test_what_is_read_of_cards_is_there() -> None:
    """Passes through 10 layers, ten more through 10 and 8 with their memory, and two updates."""
    found = [each for each in OURS if "planner_calibration" not in each.source]
    assert len(found) == 1 + 10 * 2 + 2 and all(each.measured for each in found)


def test_a_fit_finds_the_numbers_that_figures_were_made_with() -> None:
    numbers = (2.0, 4e-3, 0.4, 1.2)
    made = [
        dataclasses.replace(each, measured=predict_own(each, numbers))
        for each in OURS
        if each.quantity in ("passes", "step")
    ]
    found = fit_own(made)
    for each in made:
        assert predict_own(each, found) == pytest.approx(each.measured, rel=0.02)
    assert any(abs(predict(each) / (each.measured or 1) - 1) > 0.1 for each in made)


def test_table_of_errors_takes_its_old_place() -> None:
    text = f"before\n\n{TABLE_START}\n| --- |\n| old |\n\nafter\n"
    lines = [TABLE_START, "| --- |", "| new |", "| newer |"]
    assert with_table(text, lines) == f"before\n\n{chr(10).join(lines)}\n\nafter\n"
    with pytest.raises(ValueError, match="no table"):
        with_table("none", lines)


def test_command_writes_sources(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("errors") / "errors.json"
    assert main(["--errors", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert all(row["source"] for row in found)
    assert any(row["measured"] is None and row["predicted"] > 0 for row in found)


def test_calibration_runs_at_toy_size(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
) -> None:
    folder = tmp_path_factory.mktemp("cards")
    finished = run_python(
        *("-m", "benchmarks.planner_calibration", "--name", "toy", "--model", "kanana_2_tiny"),
        *("--layers", "2", "--sequences", "2", "--sequence-length", "64", "--microbatches", "2"),
        *("--steps", "1", "--vocabulary", "2048", "--cache-dir", str(cache_dir)),
        *("--recompute", "full", "--results-dir", str(folder)),
    )
    assert finished.returncode == 0, finished.stderr
    card = json.loads((folder / "toy.json").read_text())
    names = [row["name"] for row in card["rows"]]
    parts = ("step", "passes", "host's part of a microbatch")
    assert names == [f"recompute full: {part}" for part in parts]
    assert all(row["ours"] > 0 for row in card["rows"])
