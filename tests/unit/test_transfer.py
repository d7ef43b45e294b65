"""muP's factors against the published tables, and the weights they make."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_kanana.config.schema import PARAMETER_KINDS, ModelSettings, TransferSettings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.model.initialization import initialize_weights
from megatron_kanana.optimizer.logical_matrices import LOGICAL_MATRICES, UnknownParameterError
from megatron_kanana.optimizer.transfer import (
    WIDTH_RULES,
    initial_std,
    learning_rate_factor,
    weight_decay_factor,
)

BASE = 1024
AS_PRINTED = TransferSettings(base_hidden_size=BASE, scale_output=False)
DIVIDED = TransferSettings(base_hidden_size=BASE)

LAYER = "module.module.decoder.layers.3"
ATTENTION, EXPERTS = f"{LAYER}.self_attention", f"{LAYER}.mlp.experts"

# Tables 1 and 2 of arXiv 2608.20061, with r = base width / width: factor of the learning rate, and
# initial variance as a number, or as a multiple of the base variance. The proxies keep the widths
# of dense layers and experts, and MLA's ranks.
VECTOR_VARIANCE = 0.04
TABLE = {
    "module.module.embedding.word_embeddings.weight": ("1", "vector"),
    "module.module.output_layer.weight": ("1", "vector"),
    f"{EXPERTS}.down": ("1", "1"),
    f"{LAYER}.mlp.shared_experts.linear_fc2.weight": ("1", "1"),
    f"{EXPERTS}.gate_up": ("r", "r"),
    f"{LAYER}.mlp.shared_experts.linear_fc1.weight": ("r", "r"),
    f"{LAYER}.mlp.router.weight": ("r", "r"),
    f"{LAYER}.mlp.linear_fc1.weight": ("r", "r"),
    f"{LAYER}.mlp.linear_fc2.weight": ("1", "1"),  # the dense layer's width stays
    f"{ATTENTION}.linear_q_proj.weight": ("r", "r"),
    f"{ATTENTION}.linear_q_down_proj.weight": ("r", "r"),
    f"{ATTENTION}.linear_q_up_proj.weight": ("1", "1"),
    f"{ATTENTION}.linear_kv_down_proj.weight": ("r", "r"),
    f"{ATTENTION}.linear_kv_up_proj.weight": ("1", "1"),
    f"{ATTENTION}.linear_proj.weight": ("r", "r"),
    "module.mtp.layers.0.eh_proj.weight": ("r", "r"),
}
VECTORS = (f"{LAYER}.input_layernorm.weight", f"{LAYER}.mlp.linear_fc1.bias")


def proxy(hidden_size: int) -> ModelSettings:
    """The shipped proxy of that width, with low-rank queries so that all projections occur."""
    return shipped_model(f"kanana_2_155b_proxy_{hidden_size}", "model.q_lora_rank=1536")


@pytest.mark.parametrize("hidden_size", [1024, 1536, 2048, 4096])
def test_factors_of_the_shipped_proxies_are_the_published_ones(hidden_size: int) -> None:
    model = proxy(hidden_size)
    values = {"1": 1.0, "r": BASE / hidden_size}
    for name, (learning_rate, variance) in TABLE.items():
        factor = learning_rate_factor(name, model, AS_PRINTED)
        assert factor == pytest.approx(values[learning_rate], rel=1e-12)
        base = model.init_std**2
        wanted = VECTOR_VARIANCE if variance == "vector" else base * values[variance]
        assert initial_std(name, model, AS_PRINTED) ** 2 == pytest.approx(wanted, rel=1e-12)
        assert weight_decay_factor(name, model, AS_PRINTED) == 1.0
    for name in VECTORS:
        assert learning_rate_factor(name, model, DIVIDED) == 1.0


def test_the_output_layers_divisor_is_in_its_weights() -> None:
    """Multiplying W by 1/m and training it as W trains is what a divisor outside would do."""
    model, name = proxy(4096), "module.module.output_layer.weight"
    assert initial_std(name, model, DIVIDED) == initial_std(name, model, AS_PRINTED) / 4
    rate = learning_rate_factor(name, model, DIVIDED)
    assert rate == 1 / 4
    assert rate * weight_decay_factor(name, model, DIVIDED) == 1.0
    for other in TABLE.keys() - {name}:
        for factor in (initial_std, learning_rate_factor, weight_decay_factor):
            assert factor(other, model, DIVIDED) == factor(other, model, AS_PRINTED)


def test_without_a_base_nothing_changes() -> None:
    model = proxy(4096)
    for name in (*TABLE, "a.parameter.of.another.model"):
        assert learning_rate_factor(name, model, TransferSettings()) == 1.0
        assert weight_decay_factor(name, model, TransferSettings()) == 1.0
        assert initial_std(name, model, TransferSettings()) == model.init_std


def test_the_base_itself_is_a_standard_model() -> None:
    model = proxy(BASE)
    transfer = TransferSettings(base_hidden_size=BASE, vector_init_std=None)
    for name in TABLE:
        assert learning_rate_factor(name, model, transfer) == 1.0
        assert weight_decay_factor(name, model, transfer) == 1.0
        assert initial_std(name, model, transfer) == model.init_std


def test_every_kind_of_parameter_has_a_rule_and_unknown_ones_are_refused() -> None:
    kinds = {rule.kind for rule in WIDTH_RULES}
    assert kinds == {rule.kind for rule in LOGICAL_MATRICES} >= set(PARAMETER_KINDS)
    with pytest.raises(UnknownParameterError, match="new_projection"):
        learning_rate_factor("decoder.layers.0.new_projection.weight", proxy(1024), DIVIDED)


@pytest.mark.parametrize(
    ("key", "std"),
    [
        ("embedding.word_embeddings.weight", 0.3),
        ("output_layer.weight", 0.3 / 2),
        ("decoder.layers.self_attention.linear_q_proj.weight", 0.05 / math.sqrt(2)),
        ("decoder.layers.self_attention.linear_kv_up_proj.weight", 0.05),
        ("decoder.layers.self_attention.linear_proj.weight", 0.05 / math.sqrt(2) / math.sqrt(8)),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", 0.05 / math.sqrt(2)),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", 0.05 / math.sqrt(8)),
        ("decoder.layers.mlp.router.weight", 0.05 / math.sqrt(2)),
    ],
)
def test_initial_weights_have_the_spread_of_their_class(key: str, std: float) -> None:
    model = shipped_model("kanana_2_tiny")  # 128 wide, 4 layers
    transfer = TransferSettings(base_hidden_size=64, vector_init_std=0.3, matrix_init_std=0.05)
    weight = torch.zeros(512, 512)
    initialize_weights({key: ShardedTensor.from_rank_offsets(key, weight)}, model, 1, transfer)
    assert float(weight.std()) == pytest.approx(std, rel=0.01)
