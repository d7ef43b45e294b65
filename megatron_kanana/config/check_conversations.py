"""Files of conversations, and what cannot go together with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .problems import Problem
from .schema import Settings

SUFFIXES = (".jsonl", ".parquet")


def check_conversations(settings: Settings) -> Iterator[Problem]:
    """The files exist, each is used once, and text is not asked for as well."""
    data = settings.data
    taken: dict[str, str] = {}
    for name in ("conversations", "held_out_conversations"):
        for index, path in enumerate(getattr(data, name)):
            yield from _check_file(f"data.{name}[{index}]", path, taken)
    if data.held_out_conversations and not data.conversations:
        yield Problem(
            "data.held_out_conversations",
            ", ".join(data.held_out_conversations),
            "there are no data.conversations to train on",
            "name some, or evaluate on text with data.evaluation_sets",
        )
    if data.conversations and (data.blend or data.blend_changes):
        yield Problem(
            "data.blend" if data.blend else "data.blend_changes",
            "given",
            "a run trains either on text or on data.conversations",
            "leave one of them out",
        )


def check_expert_bias(settings: Settings) -> Iterator[Problem]:
    """There are biases to reset."""
    checkpoint = settings.checkpoint
    if checkpoint.reset_expert_bias and checkpoint.load is None:
        yield Problem(
            "checkpoint.reset_expert_bias",
            "true",
            "checkpoint.load names no checkpoint to take biases from; new ones are zero",
            "set checkpoint.load, or leave it out",
        )


def _check_file(setting: str, path: str, taken: dict[str, str]) -> Iterator[Problem]:
    if path in taken:
        yield Problem(setting, path, f"is {taken[path]} already", "name it once")
    elif Path(path).suffix not in SUFFIXES:
        yield Problem(setting, path, "is no chat file", f"give a {' or '.join(SUFFIXES)} file")
    elif not Path(path).is_file():
        yield Problem(setting, path, "no such file", "give a file of conversations")
    taken.setdefault(path, setting)
