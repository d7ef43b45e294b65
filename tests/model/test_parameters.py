"""Parameter counts: what is published, and what a built model has."""

from __future__ import annotations

import pytest

from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.planning import count_parameters
from tests.launch import run_python

# total and active; the proxies' published sizes are rounded, and their convention is not known
PUBLISHED = {
    "kanana_2_30b_a3b": (30.671e9, 3.614e9, 2e-5),
    "kanana_2_155b_a17b": (156.78e9, 16.31e9, 5e-4),
    "kanana_2_155b_a17b_q_lora_1536": (155.22e9, 14.75e9, 5e-4),
    "kanana_2_155b_proxy_1024": (10.8e9, 3.3e9, 7e-2),
    "kanana_2_155b_proxy_1536": (23e9, 4.9e9, 1e-2),
    "kanana_2_155b_proxy_2048": (40.2e9, 6.9e9, 1e-2),
    "kanana_2_155b_proxy_4096": (156.78e9, 16.31e9, 5e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_published(name: str) -> None:
    total, active, tolerance = PUBLISHED[name]
    count = count_parameters(shipped_model(name))
    assert count.total == pytest.approx(total, rel=tolerance)
    assert count.active == pytest.approx(active, rel=max(tolerance, 2e-4))


def test_counts_are_those_of_built_models() -> None:
    predicting = [f"kanana_2_tiny,++model.num_mtp_layers={layers}" for layers in (1, 2)]
    names = ["kanana_2_tiny", *predicting, *(name for name in PUBLISHED if "proxy" not in name)]
    finished = run_python("tests/model/count_on_meta.py", *names)
    assert finished.returncode == 0, finished.stderr
    lines = [line.split() for line in finished.stdout.splitlines() if line.startswith("kanana")]
    assert [line[0] for line in lines] == names
    for name, total, routed, muon in lines:
        model = shipped_model(*name.split(","))
        count = count_parameters(model)
        assert (count.total, count.routed_experts) == (int(total), int(routed))
        assert count.total - adamw_parameters(model) == int(muon)


def adamw_parameters(model: ModelSettings) -> int:
    """Embeddings, head, routers and norms: what the table of logical matrices leaves to AdamW."""
    count = count_parameters(model)
    norms_in_attention = model.kv_lora_rank + (model.q_lora_rank or 0)
    predicting = model.hidden_size * (model.num_experts + 5) + norms_in_attention
    return (
        count.embeddings
        + count.routers
        + count.norms
        + model.num_layers * norms_in_attention
        + model.num_mtp_layers * predicting
    )


def test_multi_token_prediction_counts_for_the_whole_and_not_for_what_a_token_uses() -> None:
    bare = count_parameters(shipped_model("kanana_2_30b_a3b"))
    count = count_parameters(shipped_model("kanana_2_30b_a3b", "++model.num_mtp_layers=1"))
    assert bare.multi_token_prediction == 0
    assert count.multi_token_prediction > bare.total / 48  # a layer and a projection
    assert count.total == bare.total + count.multi_token_prediction
    assert count.active == bare.active
