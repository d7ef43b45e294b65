"""Multi-token prediction is DeepSeek-V3's, and is there in training only."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launch import run_python

CASES = {
    "one layer": ("model.num_mtp_layers=1",),
    "two layers, YaRN, direct queries, dense main layers": (
        "model.num_mtp_layers=2",
        "model.mtp_loss_coefficient=0.3",
        "model.q_lora_rank=null",
        "model.yarn_factor=4",
        "model.yarn_original_context=16",
        "model.num_dense_layers=4",
    ),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Every case, one after another in one process."""
    arguments = json.dumps(list(CASES.values()))
    finished = run_python("tests/model/mtp_beside_transformers.py", arguments)
    assert finished.returncode == 0, finished.stderr
    return dict(zip(CASES, json.loads(finished.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_transformers(
    case: str, results: dict[str, dict[str, Any]]
) -> None:
    result = results[case]
    assert len(set(result["losses"])) == len(result["losses"]) >= 2
    assert result["loss_error"] < 1e-5
    assert result["gradient_error"] < 1e-3
    assert result["gradients"] > 60
    assert result["mtp_gradients"] > 15 * (len(result["losses"]) - 1)


@pytest.mark.parametrize("case", CASES)
def test_the_model_itself_is_that_without_the_layers(
    case: str, results: dict[str, dict[str, Any]]
) -> None:
    """Bit for bit; in evaluation and generation the layers are not computed at all."""
    result = results[case]
    assert result["same_training_loss"]
    assert result["same_evaluation"]
    assert result["runs_in_evaluation"] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_batch_with_no_label_for_the_layers_teaches_them_nothing(
    case: str, results: dict[str, dict[str, Any]]
) -> None:
    result = results[case]
    assert result["unlabelled_mtp_gradient"] == 0.0
    assert 0.0 < result["unlabelled_head_gradient"] < 1e3
