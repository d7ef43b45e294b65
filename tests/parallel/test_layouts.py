"""Every layout trains as one process does, from one saved checkpoint, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import saved_tensors
from tests.launch import train, train_in_turn
from tests.parallel.layouts import (
    ADAMW_WEIGHTS_TOLERANCE,
    LAYOUTS,
    PIPELINE,
    TENSOR,
    TOLERANCE,
)

FIRST_STEP, STEPS = 4, 3
ONE_PROCESS = "one process"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A checkpoint of one process after a few steps, so that optimizer state is not trivial."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, cache_dir, "start", f"stop_after_step={FIRST_STEP}")
    return folder / "start" / "checkpoints" / f"step_{FIRST_STEP:08d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of the layouts lie."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(folder: Path, cache_dir: Path, checkpoint: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of the steps after the checkpoint, of one process and of every layout."""
    go_on = (f"stop_after_step={FIRST_STEP + STEPS}", f"checkpoint.load={checkpoint}")
    layouts = {ONE_PROCESS: (1, ()), **LAYOUTS}
    records: dict[str, list[dict[str, Any]]] = {}
    for count in sorted({count for count, _ in layouts.values()}):
        jobs = {
            name: (*go_on, *overrides)
            for name, (processes, overrides) in layouts.items()
            if processes == count
        }
        records |= train_in_turn(folder, cache_dir, jobs, processes=count, timeout=240)
    return records


@pytest.mark.timeout(600)  # the first of these waits for all the runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(
    layout: str, runs: dict[str, list[dict[str, Any]]]
) -> None:
    records, one_process = runs[layout], runs[ONE_PROCESS]
    assert [record["step"] for record in records] == [5, 6, 7]
    for ours, theirs in zip(records, one_process, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), (name, ours["step"])
        assert ours["max_attention_logits"] == pytest.approx(
            theirs["max_attention_logits"], rel=1e-4
        )
    assert records[0]["expert_loads"] == one_process[0]["expert_loads"]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "EP" in name or "expert" in name])
def test_experts_are_those_of_one_process_after_the_steps(
    layout: str, runs: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    assert layout in runs
    ours, theirs = (
        saved_tensors(folder / name / "checkpoints" / f"step_{FIRST_STEP + STEPS:08d}")
        for name in (layout, ONE_PROCESS)
    )
    names = {name for name in theirs if ".mlp.experts." in name}
    assert len(names) == 2 * 3 * 4  # projections, layers, and of each its weight and fp32 state
    for name in names:
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert error < ADAMW_WEIGHTS_TOLERANCE, name


def test_a_run_from_scratch_starts_alike_in_every_layout(tmp_path: Path, cache_dir: Path) -> None:
    stop = "stop_after_step=1"
    alone = train(tmp_path, cache_dir, "alone", stop)
    split = train(tmp_path, cache_dir, "split", stop, TENSOR, PIPELINE, processes=4)
    assert split[0]["loss"] == pytest.approx(alone[0]["loss"], rel=TOLERANCE)
    assert split[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=TOLERANCE)
