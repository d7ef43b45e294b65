"""Which parameters share rates and an optimizer: megatron-core's overrides of parameter groups."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_kanana.config import Settings
from megatron_kanana.config.schema import OptimizerSettings

from .logical_matrices import is_muon, rule_of

MUON_GROUP = "muon"
"""Set in the parameter groups that Muon updates."""


def parameter_group_overrides(config: OptimizerConfig, settings: Settings) -> dict[ParamKey, Any]:
    """What differs from the settings in which parameters; several may hold for one parameter."""
    optimizer = settings.optimizer
    # megatron-core's own spare vectors, and so norms, of weight decay.
    overrides: dict[ParamKey, Any] = (
        {} if optimizer.decay_norms else get_standard_config_overrides(config)
    )
    if optimizer.name == "muon":
        overrides[_where(optimizer, muon=True)] = {MUON_GROUP: True}
        factor = optimizer.adamw_learning_rate_factor
        if factor != 1.0:
            overrides[_where(optimizer, muon=False)] = {
                "max_lr": config.lr * factor,
                "min_lr": config.min_lr * factor,
            }
    return overrides


def is_muon_parameter(name: str, optimizer: OptimizerSettings) -> bool:
    """Whether Muon updates the parameter called `name`.

    Raises:
        UnknownParameterError: no rule of the table names it.
    """
    return is_muon(rule_of(name), optimizer.muon_kinds, optimizer.adamw_kinds)


def _where(optimizer: OptimizerSettings, *, muon: bool) -> ParamKey:
    def matches(_: Any, name: str) -> bool:
        return is_muon_parameter(name, optimizer) == muon

    return ParamKey(with_name_predicate=ParamWithNamePredicate(f"muon={muon}", matches))
