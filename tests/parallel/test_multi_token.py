"""With a multi-token prediction layer, too, every layout trains as one process does, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import saved_tensors
from tests.launch import train, train_in_turn

FIRST_STEP, LAST_STEP = 4, 7
TOLERANCE = 1e-5  # relative

LAYER = "model.num_mtp_layers=1"
TENSOR = "parallel.tensor_parallel_size=2"
PIPELINE = "parallel.pipeline_parallel_size=2"
VIRTUAL = "parallel.virtual_pipeline_stages=2"
EXPERT = "parallel.expert_parallel_size=2"
OVERLAP = "parallel.overlap_gradient_reduction=true"
RECOMPUTE = "parallel.recompute=full"

# On four processes. With PP2 the first and the last stage each hold the embedding; with DP2
# besides, each part of its gradient is on another process.
LAYOUTS = {
    "TP2 x DP2 with overlapped reduction": (TENSOR, OVERLAP),
    "TP2 x PP2": (TENSOR, PIPELINE),
    "PP2 x DP2": (PIPELINE,),
    "PP2 x DP2 with 2 virtual stages": (PIPELINE, VIRTUAL),
    "EP2 x DP4 with full recomputation": (EXPERT, RECOMPUTE),
}
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_process(folder: Path, cache_dir: Path) -> Records:
    """A run of one process, which leaves a checkpoint on its way."""
    save = (f"checkpoint.save_interval={FIRST_STEP}", "checkpoint.keep_last=3")
    return train(folder, cache_dir, "one", LAYER, *save, f"stop_after_step={LAST_STEP}")


@pytest.fixture(scope="module")
def runs(folder: Path, cache_dir: Path, one_process: Records) -> dict[str, Records]:
    """Every layout from that checkpoint on, one from a later step of itself, one from scratch."""
    checkpoint = folder / "one" / "checkpoints" / f"step_{FIRST_STEP:08d}"
    load, stop = f"checkpoint.load={checkpoint}", f"stop_after_step={LAST_STEP}"
    save = "checkpoint.save_interval=6"
    jobs = {name: (LAYER, load, stop, save, *layout) for name, layout in LAYOUTS.items()}
    middle = folder / "PP2 x DP2" / "checkpoints" / "step_00000006"
    jobs["resumed"] = (LAYER, f"checkpoint.load={middle}", stop, *LAYOUTS["PP2 x DP2"])
    jobs["from scratch"] = (LAYER, TENSOR, PIPELINE, "stop_after_step=1")
    return train_in_turn(folder, cache_dir, jobs, processes=4, timeout=280)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(
    layout: str, runs: dict[str, Records], one_process: Records
) -> None:
    records = runs[layout]
    assert [record["step"] for record in records] == [5, 6, 7]
    for ours, theirs in zip(records, one_process[FIRST_STEP:], strict=True):
        for name in ("loss", "grad_norm", "mtp_losses"):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), (name, ours["step"])
        assert ours["max_attention_logits"] == pytest.approx(
            theirs["max_attention_logits"], rel=1e-4
        )
    assert records[0]["expert_loads"] == one_process[FIRST_STEP]["expert_loads"]


def test_a_run_from_scratch_starts_alike(runs: dict[str, Records], one_process: Records) -> None:
    for name in ("loss", "grad_norm", "mtp_losses"):
        ours, theirs = runs["from scratch"][0][name], one_process[0][name]
        assert ours == pytest.approx(theirs, rel=TOLERANCE), name


def test_layers_for_multi_token_prediction_are_measured_after_the_others(
    one_process: Records,
) -> None:
    last = one_process[-1]
    assert len(last["max_attention_logits"]) == 4 + 1
    assert len(set(last["max_attention_logits"])) == 5
    assert list(last["expert_loads"]) == ["2", "3", "4", "5"]  # the first layer is dense
    assert [sum(load) for load in last["expert_loads"].values()] == [8 * 64 * 2] * 4
    assert 0.0 < last["mtp_losses"][0] < one_process[0]["mtp_losses"][0]
    assert last["mtp_losses"][0] != last["loss"]


def test_biases_of_its_experts_are_updated(folder: Path, one_process: Records) -> None:
    tensors = saved_tensors(folder / "one" / "checkpoints" / f"step_{LAST_STEP:08d}")
    bias = tensors["mtp.layers.0.transformer_layer.mlp.router.expert_bias"]
    assert bias.abs().max() > 0


def test_a_resumed_run_is_bit_identical(folder: Path, runs: dict[str, Records]) -> None:
    for ours, theirs in zip(runs["resumed"], runs["PP2 x DP2"][2:], strict=True):
        for name in ("step", "loss", "grad_norm", "mtp_losses", "expert_loads"):
            assert ours[name] == theirs[name]
    ends = [
        saved_tensors(folder / name / "checkpoints" / f"step_{LAST_STEP:08d}")
        for name in ("PP2 x DP2", "resumed")
    ]
    assert "mtp.layers.0.eh_proj.weight" in ends[0]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
