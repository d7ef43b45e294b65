"""Checkpoints as the settings see them: their names, and the settings kept in each."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from .manifest import (
    MANIFEST_FILE,
    TEXT_FILES,
    Damage,
    DamagedManifestError,
    damage_of,
    read_manifest,
)
from .schema import Settings
from .wording import one_line

SETTINGS_FILE = "settings.yaml"
"""In each checkpoint's folder: the settings of the run that made it."""

_NAME = re.compile(r"step_(\d{8,})")

DAMAGED = "damaged"
"""What follows the name of a checkpoint that was found damaged, after a dot."""

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_FOLDER = "tokenizer"
"""In each checkpoint's folder: the tokenizer its model was trained with, either a SentencePiece
model under the first name or a folder of Hugging Face's files under the second."""


def write_settings(checkpoint: Path, settings: Settings) -> None:
    """Keep the settings in a checkpoint's folder."""
    text = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True)
    (checkpoint / SETTINGS_FILE).write_text(text, encoding="utf-8")


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings in a checkpoint's folder, as nested plain values.

    Raises:
        FileNotFoundError: the folder is not a whole checkpoint.
        ValueError: the file holds something else.
    """
    path = checkpoint / SETTINGS_FILE
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError(f"{path} holds no settings")
    return values


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, by which a short text becomes any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias, which settings never have")
        return super().compose_node(parent, index)


def checkpoint_tokenizer(checkpoint: Path) -> Path:
    """The tokenizer in a checkpoint's folder: a SentencePiece model or a Hugging Face folder.

    Raises:
        FileNotFoundError: there is neither.
    """
    for name in (TOKENIZER_FILE, TOKENIZER_FOLDER):
        if (checkpoint / name).exists():
            return checkpoint / name
    raise FileNotFoundError(f"{checkpoint} has neither {TOKENIZER_FILE} nor {TOKENIZER_FOLDER}/")


def whole_path(directory: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return directory / f"step_{step:08d}"


def whole_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def newest_checkpoint(directory: str) -> Path | None:
    """Newest checkpoint in `directory` at which a glance finds nothing wrong.

    While one is written its name ends in `.partial`.
    """
    whole = (whole_path(Path(directory), step) for step in reversed(whole_steps(Path(directory))))
    return next((path for path in whole if not glance(path)), None)


def glance(checkpoint: Path) -> list[Damage]:
    """What is wrong with a checkpoint, as far as its manifest and its small files show.

    The others are verified before they are loaded (`checkpoint/verification.py`).
    """
    try:
        entries = read_manifest(checkpoint)
    except FileNotFoundError:
        return _damage_without_manifest(checkpoint)
    except DamagedManifestError as error:
        return [Damage(MANIFEST_FILE, str(error))]
    small = {name: entry for name, entry in entries.items() if TEXT_FILES.fullmatch(name)}
    found = [damage_of(checkpoint, name, entry) for name, entry in small.items()]
    return [damage for damage in found if damage]


def _damage_without_manifest(checkpoint: Path) -> list[Damage]:
    """What is wrong with a folder that has none, as whole ones of earlier versions have."""
    try:
        settings = read_settings(checkpoint)
    except OSError as error:
        return [Damage(SETTINGS_FILE, f"cannot be read ({error.strerror})")]
    except ValueError as error:
        return [Damage(SETTINGS_FILE, f"cannot be read ({error})")]
    if "verify" in settings.get("checkpoint", {}):  # from when on every checkpoint has a manifest
        return [Damage(MANIFEST_FILE, "is missing")]
    parts = (".metadata", "metadata.json", "common.pt")
    return [Damage(name, "is missing") for name in parts if not (checkpoint / name).is_file()]


def damaged_folders(directory: Path) -> list[Path]:
    """Checkpoints that were found damaged and put aside."""
    return sorted(directory.glob(f"step_*.{DAMAGED}*")) if directory.is_dir() else []


def checkpoint_to_start_from(settings: Settings) -> Path | None:
    """Newest whole checkpoint of this run, else `checkpoint.load`; None to start from nothing."""
    newest = newest_checkpoint(settings.checkpoint_dir)
    if newest is None and settings.checkpoint.load is not None:
        return Path(settings.checkpoint.load)
    return newest


def goes_on(settings: Settings) -> bool:
    """Whether the run takes step and place in the data from the checkpoint it starts from."""
    own = newest_checkpoint(settings.checkpoint_dir) is not None
    return own or settings.checkpoint.load_what == "everything"
