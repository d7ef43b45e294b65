"""The table of logical matrices: what each weight holds, and who updates it."""

from __future__ import annotations

import pytest
import torch

from megatron_kanana.config.schema import PARAMETER_KINDS, ModelSettings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.optimizer.logical_matrices import (
    LOGICAL_MATRICES,
    UnknownParameterError,
    is_muon,
    matrix_shapes,
    merge,
    plain_name,
    rule_of,
    split,
)

LAYER = "module.module.decoder.layers.3"
ATTENTION = f"{LAYER}.self_attention"

KINDS = {
    f"{ATTENTION}.linear_q_proj.weight": "query",
    f"{ATTENTION}.linear_q_down_proj.weight": "query_down",
    f"{ATTENTION}.linear_q_up_proj.weight": "query_up",
    f"{ATTENTION}.linear_kv_down_proj.weight": "key_value_down",
    f"{ATTENTION}.linear_kv_up_proj.weight": "key_value_up",
    f"{ATTENTION}.linear_proj.weight": "attention_output",
    f"{ATTENTION}.kv_layernorm.weight": "norm",
    f"{LAYER}.mlp.linear_fc1.weight": "gate_up",
    f"{LAYER}.mlp.shared_experts.linear_fc2.weight": "down",
    f"{LAYER}.mlp.experts.gate_up": "gate_up",
    f"{LAYER}.mlp.experts.down": "down",
    "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": "gate_up",  # in a checkpoint
    f"{LAYER}.mlp.router.weight": "router",
    "module.mtp.layers.0.eh_proj.weight": "mtp_projection",
    "module.mtp.layers.0.enorm.weight": "norm",
    "module.mtp.layers.0.transformer_layer.self_attention.linear_q_proj.weight": "query",
    "module.decoder.final_layernorm.weight": "norm",
    "embedding.word_embeddings.weight": "embedding",
    "module.output_layer.weight": "output_layer",
    f"{LAYER}.mlp.linear_fc1.bias": "bias",
}


@pytest.fixture
def model() -> ModelSettings:
    """Sizes that are all different."""
    model = shipped_model("kanana_2_tiny")
    model.num_attention_heads, model.kv_lora_rank = 4, 10
    model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim = 3, 2, 5
    return model


@pytest.mark.parametrize("name", KINDS)
def test_each_parameter_has_one_rule(name: str) -> None:
    assert rule_of(name).kind == KINDS[name]
    matching = [rule for rule in LOGICAL_MATRICES if rule.kind == rule_of(plain_name(name)).kind]
    assert len(matching) == 1


@pytest.mark.parametrize("name", [f"{ATTENTION}.linear_new.weight", f"{LAYER}.mlp.scale"])
def test_a_parameter_without_a_rule_is_an_error(name: str) -> None:
    with pytest.raises(UnknownParameterError, match=plain_name(name)):
        rule_of(name)


def test_matrices_are_muons_and_embeddings_router_head_and_vectors_adamws() -> None:
    adamw = {rule.kind for rule in LOGICAL_MATRICES if not is_muon(rule, (), ())}
    assert adamw == {"router", "embedding", "output_layer", "norm", "bias"}


def test_settings_move_kinds_between_the_optimizers_but_vectors_stay() -> None:
    router, query, norm = (
        rule_of(name)
        for name in (
            f"{LAYER}.mlp.router.weight",
            f"{ATTENTION}.linear_q_proj.weight",
            "x.enorm.weight",
        )
    )
    assert is_muon(router, ["router"], ())
    assert not is_muon(query, (), ["query"])
    assert not is_muon(norm, ["norm"], ())
    with_matrices = {rule.kind for rule in LOGICAL_MATRICES if rule.parts}
    assert with_matrices == set(PARAMETER_KINDS)


def test_keys_and_values_of_all_heads_are_taken_apart(model: ModelSettings) -> None:
    weight = torch.randn(4 * (3 + 5), 10)
    heads = weight.view(4, 8, 10)
    key, value = split(rule_of(f"{ATTENTION}.linear_kv_up_proj.weight"), weight, model, 1)
    assert torch.equal(key, torch.cat([head[:3] for head in heads])[None])
    assert torch.equal(value, torch.cat([head[3:] for head in heads])[None])


def test_each_head_can_be_a_matrix_of_its_own(model: ModelSettings) -> None:
    weight = torch.randn(4 * (3 + 5), 10)
    rule = rule_of(f"{ATTENTION}.linear_kv_up_proj.weight")
    key, value = split(rule, weight, model, 1, per_head=["key"])
    assert torch.equal(key, weight.view(4, 8, 10)[:, :3])
    assert value.shape == (1, 20, 10)
    query = torch.randn(4 * (3 + 2), 7)
    (heads,) = split(rule_of(f"{ATTENTION}.linear_q_proj.weight"), query, model, 1, ["query"])
    assert torch.equal(heads, query.view(4, 5, 7))


def test_latent_and_rotary_key_are_taken_apart(model: ModelSettings) -> None:
    weight = torch.randn(12, 6)
    latent, rope_key = split(rule_of(f"{ATTENTION}.linear_kv_down_proj.weight"), weight, model, 1)
    assert torch.equal(latent[0], weight[:10])
    assert torch.equal(rope_key[0], weight[10:])


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_gate_and_up_are_those_of_the_unsplit_weight(num_shards: int, model: ModelSettings) -> None:
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    shards = zip(gate.chunk(num_shards), up.chunk(num_shards), strict=True)
    weight = torch.cat([part for shard in shards for part in shard])
    parts = split(rule_of("mlp.linear_fc1.weight"), weight, model, num_shards)
    assert torch.equal(parts[0][0], gate)
    assert torch.equal(parts[1][0], up)


@pytest.mark.parametrize("rule", [rule for rule in LOGICAL_MATRICES if rule.parts])
@pytest.mark.parametrize("per_head", [(), ("query", "key", "value")])
def test_merge_undoes_split_and_shapes_are_told(
    rule: object, per_head: tuple[str, ...], model: ModelSettings
) -> None:
    rule = next(other for other in LOGICAL_MATRICES if other is rule)
    rows = {"key_value_down": 12, "key_value_up": 32}.get(rule.kind, 40)
    weight = torch.randn(rows, 6)
    matrices = split(rule, weight, model, 2, per_head)
    shapes = matrix_shapes(rule, (rows, 6), model, 2, per_head)
    assert [tuple(matrix.shape) for matrix in matrices] == shapes
    assert torch.equal(merge(rule, matrices, model, 2), weight)
