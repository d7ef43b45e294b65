"""What is said about runs on two versions of megatron-core, and about one that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.megatron_versions import RunError, compare, train
from benchmarks.turns import Clock
from benchmarks.version_cases import ANOTHER_ORDER, GPU_CASES, GPU_SIZES, Case
from megatron_kanana.config import Environment, load_settings
from megatron_kanana.config.environment import TESTED_MEGATRON_CORE


def records(*losses: float, norm: float = 2.0) -> list[dict[str, Any]]:
    """A run without prediction layers."""
    return [{"loss": loss, "mtp_losses": [], "grad_norm": norm} for loss in losses]


def test_versions_are_compared_step_by_step_beside_what_rounding_does() -> None:
    ours, theirs = records(3.0, 2.0, 1.0), records(3.0, 2.25, 1.0, norm=1.0)
    found = {row.name: row for row in compare("c", ours, theirs, "0.19", records(3.5, 2.0, 1.0))}
    last = found["c: loss of step 3"]
    assert (last.ours, last.peer, last.peer_value) == (1.0, "0.19", 1.0)
    largest = found["c: largest difference of a loss"]
    assert (largest.ours, largest.peer, largest.peer_value) == (0.25, "rounding alone", 0.5)
    assert found["c: mean difference of losses"].ours == pytest.approx(0.25 / 3)
    assert found["c: largest difference of a gradient norm"].ours == 1.0


def test_losses_of_prediction_layers_are_compared_too() -> None:
    ours, theirs = records(3.0), records(3.0)
    ours[0]["mtp_losses"], theirs[0]["mtp_losses"] = [4.0, 5.0], [4.0, 5.5]
    found = {row.name: row for row in compare("c", ours, theirs, "0.19")}
    assert found["c: largest difference of a loss"].ours == 0.5
    assert found["c: largest difference of a loss"].peer is None


def test_a_run_that_fails_says_its_last_line(tmp_path: Path) -> None:
    wrong = ("model.num_layers=0",)
    with pytest.raises(RunError, match=r"ours failed: .*remedy"):
        train(1, wrong, tmp_path / "ours", 40, Clock(None), None)


def test_a_run_without_time_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ours out of time"):
        train(1, (), tmp_path / "ours", 40, Clock(0.0), None)


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_settings_of_a_gpu_are_accepted_there(case: Case) -> None:
    environment = Environment(cuda_device_count=1, megatron_core_version=TESTED_MEGATRON_CORE[-1])
    overrides = [*GPU_SIZES, *case.overrides, *ANOTHER_ORDER]  # of the fewest tokens
    load_settings([*overrides, "schedule.steps=40"], environment)
