"""The model is DeepSeek-V3's, to rounding, forwards and backwards, in fp32."""

from __future__ import annotations

import json

import pytest

from tests.launch import run_python

YARN = ("model.yarn_factor=4", "model.yarn_original_context=32")
GROUPS = (
    "model.num_expert_groups=4",
    "model.num_expert_groups_per_token=2",
    "model.num_experts_per_token=4",
)
DIRECT_QUERIES = ("model.q_lora_rank=null",)

# length, settings beside those of the tests' small model (q_lora_rank 32, one dense layer)
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "low-rank queries": (33, ()),
    "direct queries, 8 heads": (33, (*DIRECT_QUERIES, "model.num_attention_heads=8")),
    "YaRN below its boundary": (32, YARN),
    "YaRN across its boundary": (80, YARN),
    "YaRN, direct queries, 2 dense layers": (
        48,
        (*YARN, *DIRECT_QUERIES, "model.num_dense_layers=2"),
    ),
    "3 dense layers, no shared expert": (
        33,
        ("model.num_dense_layers=3", "model.num_shared_experts=0"),
    ),
    "one shared expert, 1 head": (
        33,
        ("model.num_shared_experts=1", "model.num_attention_heads=1"),
    ),
    "group-limited routing": (33, GROUPS),
    "group-limited routing, YaRN, direct queries": (64, (*GROUPS, *YARN, *DIRECT_QUERIES)),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    """Every case, one after another in one process."""
    arguments = json.dumps(list(CASES.values()))
    finished = run_python("tests/model/beside_transformers.py", arguments)
    assert finished.returncode == 0, finished.stderr
    measured = json.loads(finished.stdout.splitlines()[-1])
    return dict(zip(CASES, measured, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(
    case: str, results: dict[str, dict[str, float]]
) -> None:
    result = results[case]
    assert result["logit_spread"] > 0.5
    assert result["logit_difference"] < 1e-4
    assert result["gradients"] > 40
    assert result["gradient_error"] < 1e-3
