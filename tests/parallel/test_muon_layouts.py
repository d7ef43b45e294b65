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
from tests.parallel.layouts import (
    MUON,
    MUON_LAYOUTS,
    PIPELINE,
    TOLERANCE,
    checkpoint,
    weight_differences,
)

START, MIDDLE, END = 3, 6, 9
SAVE_IN_THE_MIDDLE = (f"checkpoint.save_interval={MIDDLE}",)
GOING_ON = ("DP2", "TP2 x EP2")  # from whose middle another run starts
Records = list[dict[str, Any]]


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
            for name, (processes, layout) in MUON_LAYOUTS.items()
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


@pytest.mark.parametrize("run", [*MUON_LAYOUTS, "from TP2 x EP2 to PP2"])
def test_weights_are_those_of_one_process(run: str, folder: Path, runs: dict[str, Records]) -> None:
    differences = weight_differences(*(checkpoint(folder, each, END) for each in (run, "one")))
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
