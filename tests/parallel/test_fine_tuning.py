"""Fine-tuning with MuonClip on packed conversations: the same in every layout, and when resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import saved_tensors
from tests.launch import CONFIG_DIR, run_python, train, train_in_turn

STEPS, MIDDLE = 4, 2
TENSOR = "parallel.tensor_parallel_size=2"
CONTEXT = "parallel.context_parallel_size=2"
PIPELINE = "parallel.pipeline_parallel_size=2"
EXPERT = "parallel.expert_parallel_size=2"
LAYOUTS = {"TP2": (TENSOR,), "CP2": (CONTEXT,), "PP2": (PIPELINE,), "EP2 x DP2": (EXPERT,)}
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, with 80 conversations of one to four turns, and one line in ten bad."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    generator = random.Random(1)
    words = ["import", "return", "class", "self", "서울", "날씨", "and", "the", "of", "None"]
    lines = []
    for number in range(80):
        messages = []
        for _ in range(generator.randint(1, 4)):
            for role, length in (("user", 12), ("assistant", 9)):
                some = generator.choices(words, k=generator.randint(1, length))
                messages.append({"role": role, "content": " ".join(some)})
        lines.append(json.dumps({"messages": [] if number % 10 == 3 else messages}))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def overrides(folder: Path) -> tuple[str, ...]:
    """Of every run."""
    return (
        f"data.conversations=[{folder / 'chat.jsonl'}]",
        *("data.held_out_percent=20", "data.chat.max_rejected_percent=10"),
        *("data.sequence_length=256", "optimizer=muon", "optimizer.learning_rate=4e-3"),
        *("optimizer.qk_clip_threshold=0.05", "model.num_mtp_layers=1"),
        *(f"schedule.steps={STEPS}", "schedule.warmup_steps=1", "schedule.decay_steps=0"),
        *("schedule.global_batch_size=4", "schedule.evaluation_interval=2"),
        *("schedule.evaluation_batches=2", "schedule.minimum_learning_rate=0"),
    )


@pytest.fixture(scope="module")
def one_process(folder: Path, cache_dir: Path, overrides: tuple[str, ...]) -> Records:
    """A run of one process, which leaves a checkpoint on its way."""
    save = (f"checkpoint.save_interval={MIDDLE}", "checkpoint.keep_last=3")
    return train(folder, cache_dir, "one", *overrides, *save)


@pytest.fixture(scope="module")
def runs(
    folder: Path, cache_dir: Path, overrides: tuple[str, ...], one_process: Records
) -> dict[str, Records]:
    """Every layout from the start; one that goes on from the middle; two that begin from it."""
    middle = f"checkpoint.load={folder / 'one' / 'checkpoints' / f'step_{MIDDLE:08d}'}"
    begin = (middle, "checkpoint.load_what=weights", "stop_after_step=1")
    frozen = "model.expert_bias_update_rate=0"
    jobs = {name: (*overrides, *layout) for name, layout in LAYOUTS.items()}
    jobs["resumed on two"] = (*overrides, middle)
    jobs["frozen"] = (*overrides, *begin, frozen)
    jobs["zero"] = (*overrides, *begin, frozen, "checkpoint.reset_expert_bias=true")
    return train_in_turn(folder, cache_dir, jobs, processes=2, timeout=280)


@pytest.mark.timeout(400)  # the first of these waits for all the runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_learns_as_one_process_does(
    layout: str, runs: dict[str, Records], one_process: Records
) -> None:
    records = runs[layout]
    assert len(records) == len(one_process) == STEPS + 2
    for ours, theirs in zip(records, one_process, strict=True):
        assert ours["step"] == theirs["step"]
        for name in theirs.keys() & {"loss", "grad_norm", "evaluation_loss", "mtp_losses"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours["step"])
    assert records[0]["expert_loads"] == one_process[0]["expert_loads"]


def test_it_learns_and_clips_heads(one_process: Records) -> None:
    steps = [record for record in one_process if "loss" in record]
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"]
    assert sum(record["clipped_heads"] for record in steps) > 0
    held_out = [record["evaluation_loss"] for record in one_process if "loss" not in record]
    assert held_out[1] < held_out[0]


def test_a_run_goes_on_with_the_conversations_that_come_next(
    runs: dict[str, Records], one_process: Records
) -> None:
    ours, theirs = (
        [record for record in records if "loss" in record and record["step"] > MIDDLE]
        for records in (runs["resumed on two"], one_process)
    )
    assert [record["step"] for record in ours] == [3, 4]
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
    assert ours[0]["expert_loads"] == theirs[0]["expert_loads"]


def test_expert_biases_are_inherited_and_frozen_or_set_to_zero(
    folder: Path, runs: dict[str, Records]
) -> None:
    def biases(name: str, step: int) -> torch.Tensor:
        tensors = saved_tensors(folder / name / "checkpoints" / f"step_{step:08d}")
        found = [tensor for key, tensor in tensors.items() if "expert_bias" in key]
        return torch.cat([tensor.flatten() for tensor in found])

    assert runs["frozen"][0]["step"] == runs["zero"][0]["step"] == 1
    inherited = biases("one", MIDDLE)
    assert bool(inherited.any())
    assert torch.equal(biases("frozen", 1), inherited)
    assert not biases("zero", 1).any()


def test_too_many_bad_records_end_every_process_with_the_lines(
    folder: Path, cache_dir: Path, overrides: tuple[str, ...]
) -> None:
    words = [*("--config-dir", str(CONFIG_DIR), "experiment=small"), *overrides]
    words += [f"output_dir={folder}", f"data.cache_dir={cache_dir}", "run_name=bad"]
    words += ["data.chat.max_rejected_percent=1"]
    finished = run_python("-m", "megatron_kanana.train", *words, processes=2, anew=True)
    assert finished.returncode != 0
    assert "more than data.chat.max_rejected_percent = 1.0" in finished.stderr
    assert f"{folder / 'chat.jsonl'}, line 4: " in finished.stderr
    assert "all of them: " in finished.stderr
    assert "exitcode  : 2" in finished.stderr  # as torchrun tells it
