"""Averaged weights: the closed form, in other layouts, over interruptions, without side effects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import saved_tensors
from tests.launch import train_in_turn

DECAY = 0.6
LAST = 6
AVERAGED = (
    f"schedule.weight_average_decay={DECAY}",
    "schedule.weight_average_interval=2",
    "schedule.evaluation_interval=2",
    "schedule.evaluation_batches=1",
)
EVALUATED = AVERAGED[2:]
SAVED = ("checkpoint.save_interval=2", "checkpoint.keep_last=10", f"stop_after_step={LAST}")
BF16 = "precision=bf16"
MUON = "optimizer=muon"
FP32 = (
    *AVERAGED,
    # What else no layout changes: muP's factors, and which samples a growing batch has.
    "transfer.base_hidden_size=32",
    "schedule.global_batch_size=4",
    "schedule.batch_size_changes=[{tokens:1000,global_batch_size:8}]",
)
PREFIX = "optimizer.state.weight_average."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder: Path, cache_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of runs on one process."""
    return train_in_turn(
        folder,
        cache_dir,
        {
            "straight": (*AVERAGED, *SAVED, BF16, MUON),
            "without": (*EVALUATED, *SAVED, BF16, MUON),
            "half": (*AVERAGED, BF16, MUON, "stop_after_step=3"),
            "resumed": (*AVERAGED, BF16, MUON, *from_checkpoint(folder, "half", 3)),
            "late": (*AVERAGED, BF16, MUON, *from_checkpoint(folder, "without", 4)),
            "fp32": (*FP32, *SAVED),
        },
    )


def from_checkpoint(folder: Path, run: str, step: int) -> tuple[str, str]:
    """Words to go on from another run to the last step."""
    checkpoint = folder / run / "checkpoints" / f"step_{step:08d}"
    return f"checkpoint.load={checkpoint}", f"stop_after_step={LAST}"


def averages(folder: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    """Averaged weights in a checkpoint, by the parameter's name."""
    tensors = saved_tensors(folder / run / "checkpoints" / f"step_{step:08d}")
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }


def weights(folder: Path, run: str, step: int) -> dict[str, torch.Tensor]:
    """fp32 weights in a checkpoint, by the parameter's name."""
    prefix = "optimizer.state.param."
    tensors = saved_tensors(folder / run / "checkpoints" / f"step_{step:08d}")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def evaluations(records: list[dict[str, Any]], name: str) -> list[float]:
    """A measurement, as often as it was made."""
    return [record[name] for record in records if name in record]


@pytest.mark.parametrize("run", ["straight", "fp32"])
def test_the_average_is_the_closed_form_of_the_saved_weights(
    run: str, folder: Path, runs: dict[str, Any]
) -> None:
    assert run in runs
    by_step = [weights(folder, run, step) for step in (2, 4, 6)]
    found = averages(folder, run, LAST)
    assert found.keys() == by_step[0].keys()
    assert len(found) > 20
    for name, average in found.items():
        second, fourth, sixth = (of[name].double() for of in by_step)
        wanted = DECAY * (DECAY * second + (1 - DECAY) * fourth) + (1 - DECAY) * sixth
        torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=1e-9)


def test_averages_are_evaluated_and_training_does_not_notice(
    folder: Path, runs: dict[str, Any]
) -> None:
    straight = runs["straight"]
    plain, averaged = (
        evaluations(straight, name) for name in ("evaluation_loss", "averaged_evaluation_loss")
    )
    assert plain[0] == averaged[0]  # the first average is the weights themselves
    assert plain[1] != averaged[1]
    assert plain == evaluations(runs["without"], "evaluation_loss")
    assert not evaluations(runs["without"], "averaged_evaluation_loss")
    assert evaluations(straight, "loss") == evaluations(runs["without"], "loss")
    ours, theirs = weights(folder, "straight", LAST), weights(folder, "without", LAST)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not averages(folder, "without", LAST)


def test_a_resumed_run_has_bit_identical_averages(folder: Path, runs: dict[str, Any]) -> None:
    name = "averaged_evaluation_loss"
    assert evaluations(runs["resumed"], name) == evaluations(runs["straight"], name)[1:]
    ours, theirs = averages(folder, "resumed", LAST), averages(folder, "straight", LAST)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_averages_are_the_same_in_other_layouts(
    folder: Path, cache_dir: Path, runs: dict[str, Any]
) -> None:
    """Half of the steps under tensor parallelism, the rest with experts dealt over processes."""
    tensor, expert = "parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2"
    moved = train_in_turn(
        folder,
        cache_dir,
        {
            "first": (*FP32, tensor, "stop_after_step=3"),
            "second": (*FP32, expert, *from_checkpoint(folder, "first", 3)),
        },
        processes=2,
    )
    for name, after in (("averaged_evaluation_loss", 1), ("loss", 3), ("tokens", 4)):
        found = evaluations(moved["second"], name)
        wanted = evaluations(runs["fp32"], name)[after:]
        assert found == pytest.approx(wanted, rel=1e-5), name
    assert found[-1] == 64 * (4 * 4 + 2 * 8)
    ours, theirs = averages(folder, "second", LAST), averages(folder, "fp32", LAST)
    for name, average in theirs.items():
        error = (ours[name] - average).norm() / average.norm()
        assert float(error) < 1e-5, name


def test_a_run_can_begin_to_average_from_a_checkpoint_without_averages(
    folder: Path, runs: dict[str, Any]
) -> None:
    assert "late" in runs
    fourth, sixth = (weights(folder, "without", step) for step in (4, 6))
    for name, average in averages(folder, "late", LAST).items():
        wanted = DECAY * fourth[name].double() + (1 - DECAY) * sixth[name].double()
        torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=1e-9)
