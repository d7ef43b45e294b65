"""From the command line to checked settings: Hydra composes, every error is collected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .check_layout import check_model, check_sharding
from .checks import check
from .cluster_settings import ClusterSettings
from .environment import Environment
from .fields import build
from .interpolations import check_defaults, check_interpolations, check_plain, texts
from .problems import ConfigurationError, Problem
from .schema import Settings

CONFIG_DIR = Path(__file__).resolve().parent.parent / "conf"
GROUPS = (
    "model",
    "parallel",
    "precision",
    "optimizer",
    "transfer",
    "schedule",
    "data",
    "checkpoint",
    "logging",
    "cluster",
    "experiment",
)


def load_settings(
    overrides: Sequence[str],
    environment: Environment,
    config_dir: str | None = None,
    *,
    with_files: bool = True,
) -> Settings:
    """Compose the configuration, check every setting and every combination.

    Args:
        overrides: command-line words such as `model=kanana_2_tiny` or `schedule.steps=20`.
        environment: the machine and the launch to check against.
        config_dir: folder with more config groups, searched beside the shipped ones.
        with_files: whether files that the settings name must be there.

    Raises:
        ConfigurationError: with all the problems found.
    """
    problems: list[Problem] = []
    if config_dir is not None and not Path(config_dir).is_dir():
        problems.append(
            Problem("--config-dir", config_dir, "is not a folder", "give an existing folder")
        )
        config_dir = None
    choices, assignments = _parse(overrides, config_dir, problems)
    config = _compose(choices, config_dir, problems)
    values = _apply(config, assignments, problems)
    settings = build(Settings, values, problems) if values is not None else None
    if settings is None:
        settings = _without_faults(config, assignments, problems)
    return _checked(settings, environment, problems, with_files=with_files)


def saved_settings(
    saved: Mapping[str, Any], overrides: Sequence[str], environment: Environment
) -> Settings:
    """The settings a checkpoint was made with, with overrides, checked for this launch.

    Args:
        saved: nested plain values, as a checkpoint holds them.
        overrides: words such as `parallel.tensor_parallel_size=2`; groups cannot be chosen.
        environment: the machine and the launch to check against.

    Raises:
        ConfigurationError: with all the problems found.
    """
    problems: list[Problem] = []
    choices, assignments = _parse(overrides, None, problems)
    problems += [
        Problem("command line", word, "the groups are those of the checkpoint", "name a setting")
        for word in choices
    ]
    problems += check_plain(saved)
    if problems:
        raise ConfigurationError(problems)
    values = _apply(OmegaConf.create(dict(saved)), assignments, problems)
    settings = build(Settings, values, problems) if values is not None else None
    return _checked(settings, environment, problems)


def cluster_settings(
    overrides: Sequence[str], config_dir: str | None = None
) -> ClusterSettings | None:
    """The group `cluster` alone, by which the launch to check the rest against is known.

    Returns:
        None where its settings cannot be built; `load_settings` tells why.
    """
    choices, assignments = _parse(overrides, config_dir, [])
    values = _apply(_compose(choices, config_dir, []), assignments, [])
    return build(ClusterSettings, values["cluster"], []) if values is not None else None


def settings_of_model(
    model: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> Settings:
    """The default settings around another model, for a checkpoint that no run has made.

    Sizes are checked against one another and against the layout; files and this machine are not.

    Args:
        model: every setting of the group `model` that has no default.
        others: settings of other groups that differ from the defaults.

    Raises:
        ConfigurationError: with all the problems found.
    """
    problems: list[Problem] = []
    values = dict(_apply(_compose([], None, problems), [], problems) or {})
    values |= {group: {**values[group], **changed} for group, changed in others.items()}
    settings = build(Settings, {**values, "model": model}, problems)
    environment = Environment()
    if settings is not None:
        problems += [*check_model(settings, environment), *check_sharding(settings, environment)]
    if settings is None or problems:
        raise ConfigurationError(problems)
    return settings


def _checked(
    settings: Settings | None,
    environment: Environment,
    problems: list[Problem],
    *,
    with_files: bool = True,
) -> Settings:
    """The settings, if neither their making nor their combinations left a problem."""
    if settings is not None:
        problems.extend(check(settings, environment, with_files=with_files))
    if settings is None or problems:
        raise ConfigurationError(problems)
    return settings


def _without_faults(
    config: DictConfig | None, assignments: Sequence[Override], problems: Sequence[Problem]
) -> Settings | None:
    """The settings with the faulty assignments left out, so that the rest is checked as well."""
    faulty = {problem.setting for problem in problems}
    sound = [
        assignment
        for assignment in assignments
        if not any(f"{name}.".startswith(f"{assignment.key_or_group}.") for name in faulty)
        and not any(f"{assignment.key_or_group}.".startswith(f"{name}.") for name in faulty)
    ]
    values = _apply(config, sound, [])
    return build(Settings, values, []) if values is not None else None


def _compose(
    choices: Sequence[str], config_dir: str | None, problems: list[Problem]
) -> DictConfig | None:
    """Compose the groups; None on failure."""
    if config_dir and (faults := list(check_defaults(Path(config_dir)))):
        problems += faults
        return None
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("config", overrides=[*choices, *search_path])
    except Exception as error:  # Hydra and OmegaConf meet some files with errors of any class
        reason = str(error).strip() or "a file holds no settings"
        problems.append(
            Problem("config groups", " ".join(choices), reason, "mend the YAML file of a group")
        )
        return None


def _apply(
    config: DictConfig | None, assignments: Sequence[Override], problems: list[Problem]
) -> Mapping[str, Any] | None:
    """Make the assignments in a copy and resolve interpolations; None on failure."""
    if config is None:
        return None
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    for assignment in assignments:
        _assign(config, assignment, problems)
    if faults := list(check_interpolations(config)):
        problems += faults
        return None
    try:
        container = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raw = dict(texts(OmegaConf.to_container(config, resolve=False))).get(key)
        reason = str(error).splitlines()[0]
        problems.append(Problem(key, raw, reason, "name an existing setting inside ${…}"))
        return None
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _parse(
    overrides: Sequence[str], config_dir: str | None, problems: list[Problem]
) -> tuple[list[str], list[Override]]:
    """Split command-line words into group choices (kept as words) and assignments."""
    parser = OverridesParser.create()
    choices: list[str] = []
    assignments: list[Override] = []
    for word in overrides:
        try:
            (override,) = parser.parse_overrides([word])
        except (HydraException, ValueError, RecursionError):  # numbers too long, brackets too deep
            problems.append(
                Problem(
                    "command line", word, "cannot be read", "write setting=value, or group=name"
                )
            )
            continue
        named = override.key_or_group and override.package is None
        if not named or override.is_sweep_override() or override.is_delete():
            problems.append(
                Problem("command line", word, "is not one value for one setting", "set one value")
            )
        elif override.key_or_group in GROUPS:
            name = override.value()
            available = available_choices(override.key_or_group, config_dir)
            if name in available:
                choices.append(word)
            else:
                remedy = f"choose {' or '.join(available)}"
                problems.append(
                    Problem(override.key_or_group, name, "is not a config of this group", remedy)
                )
        else:
            assignments.append(override)
    return choices, assignments


def available_choices(group: str, config_dir: str | None = None) -> list[str]:
    """Names of the YAML files of a config group."""
    folders = [CONFIG_DIR, *([Path(config_dir)] if config_dir else [])]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _assign(config: DictConfig, override: Override, problems: list[Problem]) -> None:
    key = override.key_or_group
    try:
        OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
    except Exception:  # OmegaConf meets some names with errors of any class
        problems.append(
            Problem(key, override.value(), "no such setting exists", "see --print-config")
        )
