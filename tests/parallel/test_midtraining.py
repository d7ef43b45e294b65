"""A stage that begins with the weights of another: mixture, schedule and context are its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kanana.config.ledger import read_ledger
from megatron_kanana.data.builtin import BuiltinData
from tests.checkpoints import saved_tensors
from tests.launch import run_python, train_in_turn

EVALUATE = (
    "precision.compute=bf16",
    "schedule.evaluation_batches=1",
    "schedule.micro_batch_size=8",
)
PRETRAINING = (
    "schedule.steps=20",
    "optimizer.learning_rate=4.0e-3",
    "data.blend=[{source:python_standard_library,weight:1},{source:six_languages,weight:3}]",
    "schedule.evaluation_interval=20",
    *EVALUATE,
)
STAGE = (
    "checkpoint.load_what=weights",
    "schedule.steps=10",
    "schedule.warmup_steps=2",
    "schedule.decay_steps=6",
    "schedule.evaluation_interval=1",
    *EVALUATE,
)
STILL = (
    "optimizer.learning_rate=1e-12",
    "schedule.minimum_learning_rate=0",
    "model.expert_bias_update_rate=0",
)
LONGER = (
    "data.sequence_length=128",
    "model.yarn_factor=2",
    "model.yarn_original_context=64",
    "data.document_mask=true",
    "data.blend=[{source:six_languages,weight:4},{source:python_standard_library,weight:1}]",
)


def by_language(records: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Loss of each held-out set after a step."""
    (found,) = (
        r["evaluation_sets"] for r in records if "evaluation_sets" in r and r["step"] == step
    )
    return {name: figures["loss"] for name, figures in found.items()}


def checkpoint(folder: Path, name: str, step: int) -> Path:
    """Where a run saved a step."""
    return folder / name / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Pre-training, and stages that begin with its weights; their folder and their records."""
    folder = tmp_path_factory.mktemp("stages")
    load = f"checkpoint.load={checkpoint(folder, 'pretraining', 20)}"
    stage = (*STAGE, load, "stop_after_step=1")
    longer = (*stage, *LONGER)
    kept = "checkpoint.load_what=weights_and_optimizer"
    runs = {
        "pretraining": PRETRAINING,
        "still": (*stage, *STILL),
        "still and longer": (*longer, *STILL),
        "longer": longer,
        "longer with moments": (*longer, kept),
        "resumed": (
            *(*longer, f"checkpoint.load={checkpoint(folder, 'longer', 1)}"),
            *("checkpoint.load_what=everything", "stop_after_step=3"),
        ),
    }
    return folder, train_in_turn(folder, cache_dir, runs)


def test_a_stage_begins_with_the_level_of_the_checkpoint(runs: tuple[Path, dict[str, Any]]) -> None:
    _, records = runs
    before = by_language(records["pretraining"], 20)
    assert set(before) == {"ko", "en", "ja", "zh", "th", "vi"}
    assert by_language(records["still"], 1) == pytest.approx(before, rel=1e-6)
    longer = by_language(records["still and longer"], 1)
    assert longer == pytest.approx(before, rel=0.02)  # 128 positions by YaRN, documents apart
    guessing = math.log(2048)
    assert sum(longer.values()) / len(longer) < guessing - 0.5
    assert records["longer"][0]["loss"] < guessing - 0.5


def test_a_stage_has_a_schedule_and_a_ledger_of_its_own(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    folder, records = runs
    steps = [record for record in records["longer"] if "loss" in record]
    assert [step["step"] for step in steps] == [1]
    assert steps[0]["learning_rate"] == pytest.approx(0.5e-3)  # of a warm-up of 2 steps to 1e-3
    assert steps[0]["source_tokens"] == {
        "six_languages": 6 * 128,
        "python_standard_library": 2 * 128,
    }
    pretraining = read_ledger(checkpoint(folder, "pretraining", 20))
    assert pretraining is not None
    assert pretraining.tokens == {"python_standard_library": 40 * 64, "six_languages": 120 * 64}
    for name, step in (("longer", 1), ("longer with moments", 1), ("resumed", 3)):
        ledger = read_ledger(checkpoint(folder, name, step))
        assert ledger is not None
        assert ledger.earlier_tokens == pretraining.tokens
        assert sum(ledger.tokens.values()) == step * 8 * 128
    resumed = [record["step"] for record in records["resumed"] if "loss" in record]
    assert resumed == [2, 3]


def test_moments_are_kept_or_begin_anew(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, records = runs
    assert records["longer"][0]["loss"] == records["longer with moments"][0]["loss"]
    old, fresh, kept = (
        saved_tensors(checkpoint(folder, name, step))
        for name, step in (("pretraining", 20), ("longer", 1), ("longer with moments", 1))
    )
    names = [name for name in old if name.startswith("optimizer.state.exp_avg.")]
    assert names
    for name in names:
        # One step on: kept is beta1 old + (1 - beta1) gradient, fresh the second term alone.
        difference = (kept[name] - fresh[name]).double()
        assert difference.allclose(0.9 * old[name].double(), rtol=1e-4, atol=1e-9)


def test_weights_trained_in_bf16_are_taken_in_fp32(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    before = saved_tensors(checkpoint(folder, "pretraining", 20))
    after = saved_tensors(checkpoint(folder, "still", 1))
    names = [name for name in before if name.startswith("optimizer.state.param.")]
    assert any(not torch.equal(before[n], before[n].bfloat16().float()) for n in names)
    for name in names:
        assert after[name].allclose(before[name], rtol=0, atol=1e-11)  # but for a step of 1e-12


def test_held_out_sets_have_the_loss_that_the_evaluation_tool_finds(
    runs: tuple[Path, dict[str, Any]], builtin: BuiltinData
) -> None:
    folder, records = runs
    names = ("ko", "th")
    finished = run_python(
        *("tools/evaluate.py", str(checkpoint(folder, "longer", 1)), "--json", "device=cpu"),
        *("--batch-size", "8", "--data", *(str(builtin.held_out[name]) for name in names)),
    )
    assert finished.returncode == 0, finished.stderr
    files = json.loads(finished.stdout)["files"]
    logged = next(r["evaluation_sets"] for r in records["longer"] if "evaluation_sets" in r)
    for name in names:
        found = files[str(builtin.held_out[name])]
        for figure in ("loss", "perplexity", "bits_per_byte"):
            assert logged[name][figure] == pytest.approx(found[figure], rel=1e-5)
