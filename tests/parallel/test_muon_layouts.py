"""Muon with QK-Clip: the same weights in every layout, resumed exactly, moved between layouts.

In fp32, from one checkpoint, with a threshold so low that heads are scaled down all the time, and
with a multi-token prediction layer. Orthogonalisation enlarges differences of rounding in small
singular values, so tensors are compared by their norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import saved_tensors
from tests.launch import train_in_turn

START, MIDDLE, END = 3, 8, 13
TOLERANCE = 1e-5  # relative

MUON = (
    "optimizer=muon",
    "optimizer.learning_rate=1.0e-3",
    "optimizer.qk_clip_threshold=0.02",
    "model.num_mtp_layers=1",
    "schedule.global_batch_size=4",
    "data.sequence_length=32",
)
SAVE_IN_THE_MIDDLE = (f"checkpoint.save_interval={MIDDLE}",)
TENSOR = "parallel.tensor_parallel_size=2"
PIPELINE = "parallel.pipeline_parallel_size=2"
EXPERT = "parallel.expert_parallel_size=2"
EXPERT_TENSOR = "parallel.expert_tensor_parallel_size=2"

LAYOUTS = {
    "TP2": (2, (TENSOR,)),
    "PP2": (2, (PIPELINE,)),
    "EP2": (2, (EXPERT,)),
    "DP2": (2, ()),
    "TP2 x EP2": (2, (TENSOR, EXPERT)),
    "expert-TP2 with DP2": (2, (EXPERT_TENSOR,)),
    "DP2 x PP2": (4, (PIPELINE,)),
    "TP2 x DP2": (4, (TENSOR,)),
}
GOING_ON = ("DP2", "TP2 x EP2")  # from whose middle another run starts
Records = list[dict[str, Any]]


def checkpoint(folder: Path, run: str, step: int) -> Path:
    """Folder of a run's checkpoint."""
    return folder / run / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs."""
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def runs(folder: Path, cache_dir: Path) -> dict[str, Records]:
    """Every run: from the start on, from its middle on, and from another layout's middle on."""
    start = f"checkpoint.load={checkpoint(folder, 'start', START)}"
    on_one = {
        "start": (f"stop_after_step={START}",),
        "one": (start, *SAVE_IN_THE_MIDDLE),
        "one again": (f"checkpoint.load={checkpoint(folder, 'one', MIDDLE)}",),
    }
    on_two, on_four = (
        {
            name: (start, *(SAVE_IN_THE_MIDDLE if name in GOING_ON else ()), *layout)
            for name, (processes, layout) in LAYOUTS.items()
            if processes == number
        }
        for number in (2, 4)
    )
    on_two["DP2 again"] = (f"checkpoint.load={checkpoint(folder, 'DP2', MIDDLE)}",)
    moved = checkpoint(folder, "TP2 x EP2", MIDDLE)
    on_two["from TP2 x EP2 to PP2"] = (f"checkpoint.load={moved}", PIPELINE)
    records: dict[str, Records] = {}
    for processes, jobs in ((1, on_one), (2, on_two), (4, on_four)):
        complete = {
            name: (*MUON, f"stop_after_step={END}", *overrides) for name, overrides in jobs.items()
        }
        records |= train_in_turn(folder, cache_dir, complete, processes=processes, timeout=280)
    return records


def relative_differences(folder: Path, run: str) -> dict[str, float]:
    """Of each weight at the end, against one process's: norm of the difference, relatively."""
    ours, theirs = (saved_tensors(checkpoint(folder, name, END)) for name in (run, "one"))
    assert ours.keys() == theirs.keys()
    return {
        name: float((ours[name] - theirs[name]).norm() / theirs[name].norm())
        for name in ours
        if not name.startswith("optimizer.")
    }


@pytest.mark.parametrize("run", [*LAYOUTS, "from TP2 x EP2 to PP2"])
def test_weights_are_those_of_one_process(run: str, folder: Path, runs: dict[str, Records]) -> None:
    differences = relative_differences(folder, run)
    assert len(differences) > 60
    assert max(differences.values()) < TOLERANCE, differences
    by_step = {record["step"]: record for record in runs["one"]}
    for ours in runs[run]:
        theirs = by_step[ours["step"]]
        assert ours["clipped_heads"] == theirs["clipped_heads"] > 0
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE)
        assert ours["max_attention_logits"] == pytest.approx(
            theirs["max_attention_logits"], rel=1e-4
        )


@pytest.mark.parametrize("run", ["one", "DP2"])
def test_a_resumed_run_is_bit_identical(run: str, folder: Path, runs: dict[str, Records]) -> None:
    straight, resumed = (
        saved_tensors(checkpoint(folder, name, END)) for name in (run, f"{run} again")
    )
    assert straight.keys() == resumed.keys()
    assert any(".momentum." in name for name in straight)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_state_is_momentum_for_matrices_and_adamws_for_the_rest(
    folder: Path, runs: dict[str, Records]
) -> None:
    names = saved_tensors(checkpoint(folder, "one", END))
    states = ("param", "momentum", "exp_avg", "exp_avg_sq")
    of = {
        state: {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        for state in states
        for prefix in [f"optimizer.state.{state}."]
    }
    assert of["exp_avg"] == of["exp_avg_sq"]
    assert of["param"] == of["momentum"] | of["exp_avg"]
    assert not of["momentum"] & of["exp_avg"]
    assert all(
        name.endswith(("norm.weight", "router.weight", "word_embeddings.weight"))
        or name == "output_layer.weight"
        for name in of["exp_avg"]
    )
