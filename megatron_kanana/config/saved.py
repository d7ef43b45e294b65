"""Settings kept beside the weights of a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from .schema import Settings

SETTINGS_FILE = "settings.yaml"
"""In each checkpoint's folder: the settings of the run that made it."""

TOKENIZER_FILE = "tokenizer.model"
"""In each checkpoint's folder: the tokenizer its model was trained with."""


def write_settings(checkpoint: Path, settings: Settings) -> None:
    """Keep the settings in a checkpoint's folder."""
    text = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True)
    (checkpoint / SETTINGS_FILE).write_text(text, encoding="utf-8")


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings in a checkpoint's folder, as nested plain values.

    Raises:
        FileNotFoundError: the folder is not a whole checkpoint.
    """
    values = yaml.safe_load((checkpoint / SETTINGS_FILE).read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def newest_checkpoint(directory: str) -> Path | None:
    """Newest whole checkpoint in `directory`; while one is written its name ends in `.partial`."""
    whole = [
        path
        for path in Path(directory).glob("step_*")
        if path.suffix != ".partial" and (path / SETTINGS_FILE).is_file()
    ]
    return max(whole, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def checkpoint_to_start_from(settings: Settings) -> Path | None:
    """Newest whole checkpoint of this run, else `checkpoint.load`; None to start from nothing."""
    newest = newest_checkpoint(settings.checkpoint_dir)
    if newest is None and settings.checkpoint.load is not None:
        return Path(settings.checkpoint.load)
    return newest
