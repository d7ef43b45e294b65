"""Which parameters share rates and an optimizer: megatron-core's overrides of parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_kanana.config import Settings
from megatron_kanana.config.schema import OptimizerSettings

from .logical_matrices import is_muon, rule_of
from .transfer import learning_rate_factor, weight_decay_factor

MUON_GROUP = "muon"
"""Set in the parameter groups that Muon updates."""


def parameter_group_overrides(
    config: OptimizerConfig, settings: Settings, names: Collection[str]
) -> dict[ParamKey, Any]:
    """What differs from the settings in which parameters; several may hold for one parameter.

    Args:
        config: megatron-core's, with the learning rates of the settings.
        settings: of the run.
        names: of this process's parameters.

    Raises:
        UnknownParameterError: with Muon or muP, for parameters the table of logical matrices lacks.
    """
    optimizer = settings.optimizer
    # megatron-core's own spare vectors, and so norms, of weight decay.
    overrides: dict[ParamKey, Any] = (
        {} if optimizer.decay_norms else get_standard_config_overrides(config)
    )
    if optimizer.name == "muon":
        muon = {name for name in names if is_muon_parameter(name, optimizer)}
        overrides[_among("Muon's", muon)] = {MUON_GROUP: True}
    for factor, those in _by_factor(names, partial(_learning_rate_factor, settings)).items():
        rates = {"max_lr": config.lr * factor, "min_lr": config.min_lr * factor}
        overrides[_among(f"learning rate x {factor}", those)] = rates
    model, transfer = settings.model, settings.transfer
    decay = partial(weight_decay_factor, model=model, transfer=transfer)
    for factor, those in _by_factor(names, decay).items():
        overrides[_among(f"weight decay x {factor}", those)] = {"wd_mult": factor}
    return overrides


def is_muon_parameter(name: str, optimizer: OptimizerSettings) -> bool:
    """Whether Muon updates the parameter called `name`.

    Raises:
        UnknownParameterError: no rule of the table names it.
    """
    return is_muon(rule_of(name), optimizer.muon_kinds, optimizer.adamw_kinds)


def _learning_rate_factor(settings: Settings, name: str) -> float:
    optimizer = settings.optimizer
    factor = learning_rate_factor(name, settings.model, settings.transfer)
    if optimizer.name == "muon" and not is_muon_parameter(name, optimizer):
        factor *= optimizer.adamw_learning_rate_factor
    return factor


def _by_factor(names: Collection[str], factor_of: Callable[[str], float]) -> dict[float, set[str]]:
    """Names by their factor, without those whose factor is 1."""
    result: dict[float, set[str]] = {}
    for name in names:
        factor = factor_of(name)
        if factor != 1.0:
            result.setdefault(factor, set()).add(name)
    return result


def _among(what: str, names: Collection[str]) -> ParamKey:
    def matches(_: Any, name: str) -> bool:
        return name in names

    return ParamKey(with_name_predicate=ParamWithNamePredicate(what, matches))
