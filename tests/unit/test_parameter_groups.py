"""Which parameters Muon updates, and the rates of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.optimizer.logical_matrices import UnknownParameterError
from megatron_kanana.optimizer.parameter_groups import MUON_GROUP, parameter_group_overrides

MATRIX = "module.decoder.layers.0.mlp.linear_fc2.weight"
HEAD = "module.output_layer.weight"
NORM = "module.decoder.final_layernorm.weight"
PEAK, LOWEST = 1e-2, 1e-3


def overrides_of(name: str, names: list[str], *words: str) -> dict[str, Any]:
    """What megatron-core will merge for one parameter."""
    settings = load_settings(["optimizer=muon", *words], Environment())
    config = OptimizerConfig(optimizer="adam", lr=PEAK, min_lr=LOWEST)
    parameter = torch.nn.Parameter(torch.zeros(2) if name == NORM else torch.zeros(2, 2))
    result: dict[str, Any] = {}
    for key, override in parameter_group_overrides(config, settings, names).items():
        if key.matches(parameter, name):
            result |= override
    return result


def test_matrices_are_marked_as_muons_and_the_rest_has_its_own_rate() -> None:
    names = [MATRIX, HEAD, NORM]
    words = ("optimizer.adamw_learning_rate_factor=0.5",)
    assert overrides_of(MATRIX, names, *words) == {MUON_GROUP: True}
    half = {"max_lr": PEAK / 2, "min_lr": LOWEST / 2}
    assert overrides_of(HEAD, names, *words) == half
    assert overrides_of(NORM, names, *words) == {**half, "wd_mult": 0.0}
    assert overrides_of(HEAD, names) == {}


def test_kinds_move_between_the_optimizers_by_the_settings() -> None:
    words = ("optimizer.muon_kinds=[output_layer]", "optimizer.adamw_kinds=[down]")
    assert overrides_of(MATRIX, [MATRIX, HEAD], *words) == {}
    assert overrides_of(HEAD, [MATRIX, HEAD], *words) == {MUON_GROUP: True}


def test_a_parameter_that_no_rule_names_is_an_error() -> None:
    with pytest.raises(UnknownParameterError, match="linear_new"):
        overrides_of(MATRIX, [MATRIX, "module.decoder.linear_new.weight"])
