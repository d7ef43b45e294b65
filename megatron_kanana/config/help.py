"""The settings as text, from the places where they are declared."""

from __future__ import annotations

import dataclasses
import typing

from .compose import GROUPS, available_choices
from .schema import Settings


def settings_help() -> str:
    """Every config group with its choices, and every setting with its meaning."""
    lines = ["config groups:"]
    lines += [f"  {group}={'|'.join(available_choices(group))}" for group in GROUPS]
    lines += ["", "settings:", *_lines(Settings, "")]
    return "\n".join(lines)


def _lines(cls: type, prefix: str) -> list[str]:
    hints = typing.get_type_hints(cls)
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += _lines(hints[field.name], f"{prefix}{field.name}.")
        else:
            lines.append(f"  {prefix}{field.name}: {field.metadata['help']}")
    return lines
