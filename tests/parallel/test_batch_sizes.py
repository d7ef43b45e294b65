"""Runs whose batch grows are bit-identical over interruptions; layouts: test_weight_average.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.launch import train_in_turn

LENGTH = 64  # of the small experiment
GROWING = (
    "schedule.global_batch_size=4",
    f"schedule.batch_size_changes=[{{tokens:{10 * LENGTH},global_batch_size:8}}]",
    "schedule.evaluation_interval=5",
    "schedule.evaluation_batches=1",
)
SIZES = (4, 4, 4, 8, 8, 8)
STOP = f"stop_after_step={len(SIZES)}"


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    """Training loss by step."""
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_a_growing_batch_is_the_same_over_interruptions(tmp_path: Path, cache_dir: Path) -> None:
    half = f"checkpoint.load={tmp_path}/half/checkpoints/step_00000002"
    runs = train_in_turn(
        tmp_path,
        cache_dir,
        {
            "straight": (*GROWING, STOP),
            "half": (*GROWING, "stop_after_step=2"),
            "resumed": (*GROWING, STOP, half),
        },
    )
    straight = runs["straight"]
    tokens = {record["step"]: record["tokens"] for record in straight}
    assert tokens == {step: LENGTH * sum(SIZES[:step]) for step in range(1, len(SIZES) + 1)}
    wanted = losses(straight)
    assert losses(runs["resumed"]) == {step: wanted[step] for step in range(3, len(SIZES) + 1)}
    evaluated = [record for record in straight if "evaluation_loss" in record]
    again = [record for record in runs["resumed"] if "evaluation_loss" in record]
    assert evaluated == again != []
