"""From a checkpoint of any layout to a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.checkpoint.torch_dist_blocks import BlockReader
from megatron_kanana.checkpoint.verification import verify_alone
from megatron_kanana.config import read_settings
from megatron_kanana.config.fields import build
from megatron_kanana.config.problems import Problem
from megatron_kanana.config.schema import ModelSettings

from .architecture import CONFIG_FILE, hugging_face_config
from .groups import group_by_size
from .problems import ConversionError
from .safetensors_source import INDEX_FILE, SINGLE_FILE
from .safetensors_writer import Entry, write_safetensors
from .text_files import write_text_files
from .weight_map import Placement, copies, empty_tensors, placements
from .work_folder import WorkFolder, files_identity

logger = logging.getLogger(__name__)

OnBytes = Callable[[int], None]

NOT_WEIGHTS = ("optimizer.", "random_state", "scheduler")
"""Beginnings of the names of what a checkpoint holds beside the weights."""


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint, found to hold exactly the model that its settings describe.

    Attributes:
        folder: the checkpoint.
        settings: of the model.
        reader: reads its tensors.
        placements: where each Hugging Face tensor lies.
        copies: tensors that a Hugging Face folder holds twice: the copy's name, the first one's.
    """

    folder: Path
    settings: ModelSettings
    reader: BlockReader
    placements: list[Placement]
    copies: dict[str, str]

    def dtype(self, placement: Placement) -> torch.dtype:
        """Format of a stored tensor."""
        dtype: torch.dtype = self.reader.tensors[placement.megatron].properties.dtype
        return dtype

    def read(self, placement: Placement) -> torch.Tensor:
        """A tensor as Hugging Face's model has it.

        Raises:
            ConversionError: the checkpoint is damaged.
        """
        try:
            weight = self.reader.read(placement.megatron, placement.offset, placement.block)
        except ValueError as error:
            raise ConversionError([str(error)]) from None
        if placement.gain_offset:
            weight -= placement.gain_offset
        return weight.view(placement.shape)


def open_megatron(folder: Path, *, verify: bool = False) -> MegatronModel:
    """Look at a checkpoint and check all of it.

    Args:
        folder: of the checkpoint.
        verify: compare every file with its checksum; else their sizes alone.

    Raises:
        ConversionError: with everything that cannot be taken.
    """
    try:
        saved = read_settings(folder)
        reader = BlockReader(folder)
    except FileNotFoundError as error:
        raise ConversionError(
            [f"{error.filename} does not exist: name a whole checkpoint's step_… folder"]
        ) from None
    except ValueError as error:
        raise ConversionError([f"{error}: give another checkpoint"]) from None
    if damages := verify_alone(folder, contents=verify):
        raise ConversionError([f"{folder}: {damage}" for damage in damages])
    problems: list[Problem] = []
    model = build(ModelSettings, saved["model"], problems, "model.")
    if model is None:
        raise ConversionError([f"settings.yaml: {p.setting}: {p.reason}" for p in problems])
    placed = placements(model)
    shapes = {placement.megatron: placement.megatron_shape for placement in placed}
    there = reader.tensors
    faults = [f"{folder}: {name} is missing" for name in shapes if name not in there]
    faults += [
        f"{folder}: {name} has shape {list(there[name].size)}, settings.yaml gives {list(shape)}"
        for name, shape in shapes.items()
        if name in there and tuple(there[name].size) != shape
    ]
    faults += [
        f"{folder}: {name} has no place in a Hugging Face model"
        for name in there
        if name not in shapes and not name.startswith(NOT_WEIGHTS)
    ]
    if faults:
        raise ConversionError(faults)
    return MegatronModel(folder, model, reader, placed, copies(model))


def to_hugging_face(
    model: MegatronModel,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write a Hugging Face folder; an interrupted conversion goes on where it was.

    Args:
        model: what to convert.
        out: the folder, which appears only when it is whole.
        dtype: format of the weights; None keeps each as it is. Expert biases are always kept.
        max_shard_bytes: size of the safetensors files.
        force: whether an existing `out` may be replaced.
        on_bytes: called with the bytes of each weight once it is written.

    Raises:
        ConversionError: `out` exists, or the checkpoint is damaged.
    """
    by_name = {placement.hugging_face: placement for placement in model.placements}
    by_name |= {copy: by_name[original] for copy, original in model.copies.items()}
    entries = [Entry(name, *_form(model, place, dtype)) for name, place in by_name.items()]
    most = Counter(entry.dtype for entry in entries).most_common(1)[0][0]
    entries += [Entry(name, most, shape) for name, shape in empty_tensors(model.settings).items()]
    files = group_by_size(entries, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(files) > 1:
        total = len(files)
        names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    identity = {
        "from": files_identity(sorted(model.folder.glob("*.*"))),
        "dtype": str(dtype),
        "files": names,
    }
    work = WorkFolder(out, identity, force=force)
    if work.resumed:
        logger.info("going on with the conversion in %s", work.path)

    def read(entry: Entry) -> torch.Tensor:
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        content = model.read(by_name[entry.name]).to(entry.dtype)
        if on_bytes is not None:
            on_bytes(entry.num_bytes)
        return content

    for name, content in zip(names, files, strict=True):
        if not (work.path / name).is_file():
            write_safetensors(work.path / name, content, read)
        elif on_bytes is not None:
            on_bytes(sum(entry.num_bytes for entry in content))
    if len(files) > 1:
        _write_json(work.path / INDEX_FILE, _index(dict(zip(names, files, strict=True))))
    end_of_text = write_text_files(model.folder, work.path)
    config = hugging_face_config(model.settings, str(most).removeprefix("torch."), end_of_text)
    _write_json(work.path / CONFIG_FILE, config)
    work.publish()


def _form(
    model: MegatronModel, placement: Placement, dtype: torch.dtype | None
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Format and shape to write a tensor in."""
    is_bias = placement.hugging_face.endswith("e_score_correction_bias")
    return model.dtype(placement) if is_bias or dtype is None else dtype, placement.shape


def _index(files: dict[str, list[Entry]]) -> dict[str, Any]:
    def each() -> Iterator[tuple[str, Entry]]:
        return ((file, entry) for file, entries in files.items() for entry in entries)

    return {
        "metadata": {"total_size": sum(entry.num_bytes for _, entry in each())},
        "weight_map": {entry.name: file for file, entry in each()},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
