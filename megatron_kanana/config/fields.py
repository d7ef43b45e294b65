"""Declaring a setting, and turning plain YAML values into typed settings."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

from .problems import Problem

T = TypeVar("T")

LONGEST_NAME = 255
"""Bytes between two slashes, as Linux has it."""

LONGEST_TEXT = 1024
"""Bytes of a text, so that a path of several is one that Linux takes: 4,096."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    several_lines: bool = False,
    fixed_by_checkpoint: bool = False,
) -> Any:
    """Declare one setting of a settings dataclass.

    Args:
        default: value when no config group names it, or the class of a group that has one for each
            of its settings; without a default the setting is required.
        help: one line for a person: what it is and its unit.
        minimum: smallest allowed value.
        above: the value must be greater than this.
        maximum: largest allowed value.
        choices: allowed strings.
        several_lines: whether text may have line breaks and tabs.
        fixed_by_checkpoint: whether weights saved with one value are useless with another.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "choices": choices}
    metadata = {
        "help": help,
        "fixed_by_checkpoint": fixed_by_checkpoint,
        "several_lines": several_lines,
        **{key: value for key, value in limits.items() if value is not None},
    }
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(
    cls: type[T], values: Mapping[str, Any], problems: list[Problem], prefix: str = ""
) -> T | None:
    """Build the settings dataclass `cls` from nested mappings, noting everything that is wrong.

    Returns:
        the settings, or None where a problem was added to `problems` (which holds all of them).
    """
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    before = len(problems)
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else _listing(prefix, known)
            problems.append(
                Problem(f"{prefix}{name}", values[name], "no such setting exists", remedy)
            )
    arguments: dict[str, Any] = {}
    for name, field in known.items():
        path = f"{prefix}{name}"
        if name in values:
            arguments[name] = _convert(hints[name], values[name], path, field.metadata, problems)
        elif _is_required(field):
            problems.append(
                Problem(path, "missing", "this setting has no default", field.metadata["help"])
            )
    return cls(**arguments) if len(problems) == before else None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _listing(prefix: str, known: Mapping[str, Any]) -> str:
    return f"the settings of {prefix.rstrip('.') or 'the configuration'} are: {', '.join(known)}"


def _convert(
    hint: Any, value: Any, path: str, metadata: Mapping[str, Any], problems: list[Problem]
) -> Any:
    """Convert `value` to the type `hint`, adding a problem where that cannot be done."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(typing.cast(type, hint), value, problems, f"{path}.")
        problems.append(Problem(path, value, "is not a group of settings", f"write {path}.…=…"))
        return None
    if (container := typing.get_origin(hint)) in (list, dict):
        convert = _convert_list if container is list else _convert_mapping
        return convert(typing.get_args(hint)[-1], value, path, metadata, problems)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is hint:
        _check_limits(value, path, metadata, problems)
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    wanted = names[hint] + (" or null" if optional else "")
    remedy = f"give {wanted}: {metadata['help']}"
    problems.append(Problem(path, value, f"is not {wanted}", remedy))
    return None


def _convert_list(
    hint: Any, value: Any, path: str, metadata: Mapping[str, Any], problems: list[Problem]
) -> list[Any] | None:
    if not isinstance(value, (list, tuple)):
        problems.append(Problem(path, value, "is not a list", f"write {path}=[…]"))
        return None
    return [
        _convert(hint, item, f"{path}[{index}]", metadata, problems)
        for index, item in enumerate(value)
    ]


def _convert_mapping(
    hint: Any, value: Any, path: str, metadata: Mapping[str, Any], problems: list[Problem]
) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        problems.append(Problem(path, value, "is not a mapping", f"write {path}={{name: …}}"))
        return None
    for name in value:
        _check_characters(str(name), f"a name in {path}", {}, problems)
    return {
        str(name): _convert(hint, item, f"{path}.{name}", metadata, problems)
        for name, item in value.items()
    }


def _check_limits(
    value: Any, path: str, metadata: Mapping[str, Any], problems: list[Problem]
) -> None:
    if isinstance(value, str):
        _check_characters(value, path, metadata, problems)
    if (choices := metadata.get("choices")) and value not in choices:
        problems.append(
            Problem(path, value, "is not one of the choices", f"choose {' or '.join(choices)}")
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    for limit, failed, words in (
        ("minimum", lambda bound: not value >= bound, "at least"),
        ("above", lambda bound: not value > bound, "above"),
        ("maximum", lambda bound: not value <= bound, "at most"),
    ):
        if limit in metadata and failed(metadata[limit]):
            problems.append(
                Problem(path, value, "is out of range", f"choose {words} {metadata[limit]}")
            )


def _check_characters(
    value: str, path: str, metadata: Mapping[str, Any], problems: list[Problem]
) -> None:
    """Text may stand in file names, scripts and messages, so it is one line that can be written."""
    allowed = "\n\t" if metadata.get("several_lines") else ""
    found = [each for each in value if unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp")]
    if strange := [each for each in found if each not in allowed]:
        reason = f"holds the character U+{ord(strange[0]):04X}"
        problems.append(Problem(path, ascii(value), reason, "leave it out"))
    elif not allowed and (
        len(value.encode()) > LONGEST_TEXT
        or max(map(len, value.encode().split(b"/"))) > LONGEST_NAME
    ):
        reason = f"is longer than {LONGEST_TEXT} bytes, or than the {LONGEST_NAME} of a file's name"
        problems.append(Problem(path, f"{value[:60]}…", reason, "shorten it"))
