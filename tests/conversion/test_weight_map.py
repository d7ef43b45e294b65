"""The table names every tensor of a built model, with its shape, and no other."""

from __future__ import annotations

import json

import pytest

from megatron_kanana.checkpoint.hugging_face.weight_map import placements
from tests.launch import run_python
from tests.model.beside_transformers import small_settings

MODELS = {
    "low-rank queries": [],
    "direct queries": ["model.q_lora_rank=null"],
    "no shared experts, 2 dense layers": [
        *("model.num_shared_experts=0", "model.num_dense_layers=2"),
    ],
    "multi-token prediction": ["model.num_mtp_layers=1"],
}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, list[int]]]:
    """Names and whole shapes of the tensors in each built model's sharded state dict."""
    finished = run_python("tests/conversion/list_tensors.py", json.dumps(MODELS))
    assert finished.returncode == 0, finished.stderr
    listed = json.loads(finished.stdout.splitlines()[-1])
    assert isinstance(listed, dict)
    return listed


@pytest.mark.parametrize("name", MODELS)
def test_table_covers_the_model(name: str, built: dict[str, dict[str, list[int]]]) -> None:
    placed = placements(small_settings(MODELS[name]).model)
    assert {place.megatron: list(place.megatron_shape) for place in placed} == built[name]
    covered: dict[str, int] = {}
    for place in placed:
        size = 1
        for side in place.block:
            size *= side
        covered[place.megatron] = covered.get(place.megatron, 0) + size
    for tensor, shape in built[name].items():
        size = 1
        for side in shape:
            size *= side
        assert covered[tensor] == size, tensor
