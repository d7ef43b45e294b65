"""What `${...}` may do: name another setting, or a variable of the environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from .problems import Problem

ALLOWED_RESOLVERS = ("oc.env",)


def check_interpolations(config: DictConfig) -> Iterator[Problem]:
    """No value calls a resolver but the allowed ones, whatever libraries have registered."""
    for name, text in texts(OmegaConf.to_container(config, resolve=False)):
        try:
            called = _resolvers(parse(text)) if "${" in text else []
        except OmegaConfBaseException as error:
            reason = f"cannot be read: {str(error).splitlines()[0]}"
            yield Problem(name, text, reason, "write ${another.setting}")
            continue
        for resolver in called:
            if resolver not in ALLOWED_RESOLVERS:
                yield Problem(
                    name,
                    text,
                    f"calls {resolver}, and settings call nothing but"
                    f" {', '.join(ALLOWED_RESOLVERS)}",
                    "write the value, ${another.setting} or ${oc.env:VARIABLE}",
                )


def check_defaults(config_dir: Path) -> Iterator[Problem]:
    """No file's `defaults` has an interpolation: over one that leads to itself Hydra never ends."""
    for path in sorted(config_dir.glob("*/*.yaml")):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):  # Hydra tells, if it is used
            continue
        defaults = values.get("defaults") if isinstance(values, dict) else None
        if "${" in str(defaults):
            yield Problem(
                f"defaults of {path}",
                defaults,
                "an interpolation cannot stand in the choices of groups",
                "name the choices",
            )


def check_plain(values: Any) -> Iterator[Problem]:
    """No value of a checkpoint's settings is an interpolation: they may be anyone's."""
    for name, text in texts(values):
        if "${" in text:
            yield Problem(
                name,
                text,
                "the settings in a checkpoint are plain values",
                "write the value into its settings.yaml, if you trust the checkpoint",
            )


def texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text among nested values, with its dotted name."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from texts(value, f"{name}[{index}]")


def _resolvers(tree: Any) -> list[str]:
    """Names of the resolvers that a parsed text calls."""
    found = [name for child in getattr(tree, "children", None) or () for name in _resolvers(child)]
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        found.insert(0, tree.resolverName().getText())
    return found
