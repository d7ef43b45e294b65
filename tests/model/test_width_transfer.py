"""muP in real runs: rates and weights of every parameter, and activations that no width changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_python

RATE = 0.5 / 2  # in the first of two warm-up steps
DECAY = 0.1
STD = 0.02
NUM_LAYERS = 2
RATIO = 1 / 4  # base width over width
PLACES = ("embedding", "attention of the last layer", "experts of the last layer", "logits")


@pytest.fixture(scope="module")
def measured(cache_dir: Path) -> Any:
    """What the script printed."""
    finished = run_python("tests/model/widths_in_one_process.py", str(cache_dir))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def is_among(name: str, *parts: str) -> bool:
    """Whether a parameter's name has one of the parts."""
    return any(part in name for part in parts)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_starts_and_learns_as_its_class_does(measured: Any, optimizer: str) -> None:
    parameters = measured["parameters"][optimizer]
    assert len(parameters) > 60
    for name, found in parameters.items():
        is_vector = len(found["shape"]) == 1
        is_output = name == "output_layer.weight"
        by_adamw = is_vector or is_output or is_among(name, "router", "embedding")
        grows = not is_vector and is_among(
            name, "q_down", "kv_down", "linear_proj", "fc1", "gate_up", "router", "eh_proj"
        )
        factor = RATIO if grows or is_output else 1.0
        if optimizer == "muon" and by_adamw:
            factor *= 0.25
        assert found["learning_rate"] == pytest.approx(RATE * factor), name
        decay = 0.0 if is_vector else DECAY / RATIO if is_output else DECAY
        assert found["weight_decay"] == pytest.approx(decay), name
        if is_vector:
            assert found["fan_in"] is None
            continue
        assert found["fan_in"] == found["shape"][1], name
        std = STD * (RATIO if is_output else math.sqrt(RATIO) if grows else 1.0)
        if is_among(name, "linear_proj.", "linear_fc2.", "experts.down"):
            std /= math.sqrt(2 * NUM_LAYERS)
        size = math.prod(found["shape"])
        assert found["std"] == pytest.approx(std, rel=5 / math.sqrt(2 * size)), name


def test_activations_change_alike_at_every_width_with_mup_alone(measured: Any) -> None:
    mup, standard = measured["growth"]["muP"], measured["growth"]["standard"]
    for place in PLACES:
        assert abs(mup[place]["change"]) < 0.35, place
    for place in PLACES[1:]:
        assert standard[place]["change"] > 0.75, place


def test_at_the_base_width_both_parametrisations_are_one_run(measured: Any) -> None:
    assert measured["sizes"]["muP"][0] == measured["sizes"]["standard"][0]
