"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import saved_tensors
from tests.launch import CONFIG_DIR, run_python, train

TENSOR = "parallel.tensor_parallel_size=2"
PIPELINE = "parallel.pipeline_parallel_size=2"


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1)])
def test_resumed_run_is_bit_identical(
    processes: int, workers: int, tmp_path: Path, cache_dir: Path
) -> None:
    straight = train(tmp_path, cache_dir, "straight", processes=processes)
    first_half = ("stop_after_step=10", "checkpoint.asynchronous=true")
    train(tmp_path, cache_dir, "halves", *first_half, processes=processes)
    halves = train(
        tmp_path, cache_dir, "halves", f"data.num_workers={workers}", processes=processes
    )
    assert [record["step"] for record in halves] == list(range(1, 21))
    for ours, theirs in zip(halves, straight, strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["grad_norm"] == theirs["grad_norm"]
        assert ours["expert_loads"] == theirs["expert_loads"]
    ends = [
        saved_tensors(tmp_path / name / "checkpoints" / "step_00000020")
        for name in ("straight", "halves")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert any("exp_avg_sq" in name for name in ends[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_goes_on_under_other_layouts(tmp_path: Path, cache_dir: Path) -> None:
    straight = train(tmp_path, cache_dir, "straight", TENSOR, "stop_after_step=6", processes=2)
    train(tmp_path, cache_dir, "moved", TENSOR, "stop_after_step=4", processes=2)
    train(tmp_path, cache_dir, "moved", "stop_after_step=5")
    records = train(tmp_path, cache_dir, "moved", PIPELINE, "stop_after_step=6", processes=2)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(records, straight, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_only_whole_checkpoints_are_resumed_and_old_ones_go(
    tmp_path: Path, cache_dir: Path
) -> None:
    often = ("checkpoint.save_interval=2", "checkpoint.keep_last=2", "checkpoint.keep_every=4")
    train(tmp_path, cache_dir, "run", *often, "stop_after_step=9")
    folder = tmp_path / "run" / "checkpoints"
    names = sorted(entry.name for entry in folder.iterdir())
    assert names == ["step_00000004", "step_00000008", "step_00000009"]
    # As a crash in the middle of saving step 9 would leave it:
    (folder / "step_00000009").rename(folder / "step_00000009.partial")
    (folder / "step_00000009.partial" / "metadata.json").unlink()
    records = train(tmp_path, cache_dir, "run", *often, "stop_after_step=10")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert (folder / "step_00000010" / "metadata.json").is_file()


def test_a_checkpoint_of_another_optimizer_is_refused_in_words(
    tmp_path: Path, cache_dir: Path
) -> None:
    train(tmp_path, cache_dir, "run", "stop_after_step=1", processes=2)
    command = ("-m", "megatron_kanana.train", "--config-dir", str(CONFIG_DIR), "experiment=small")
    folders = (f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}")
    refused = run_python(*command, *folders, "run_name=run", "optimizer=muon", processes=2)
    told = refused.stderr + refused.stdout
    assert refused.returncode != 0
    assert told.count("optimizer.name = muon") == 1
    assert "optimizer.state.momentum." in told
    assert "megatron_kanana/checkpoint" not in told  # no traceback
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    remedy = (f"checkpoint.load={checkpoint}", "checkpoint.load_what=weights")
    assert all(setting in told for setting in remedy)
    records = train(tmp_path, cache_dir, "other", "optimizer=muon", "stop_after_step=1", *remedy)
    assert [record["step"] for record in records] == [1]
