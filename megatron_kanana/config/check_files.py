"""Files that the settings name: datasets, tokenizer, checkpoints, folders to write to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from .check_conversations import check_conversations, check_expert_bias
from .check_mixture import check_evaluation_sets, check_mixture, check_position
from .environment import Environment
from .mixture import entry_paths
from .problems import Problem
from .saved import (
    SETTINGS_FILE,
    checkpoint_to_start_from,
    damaged_folders,
    glance,
    goes_on,
    newest_checkpoint,
    read_settings,
    whole_path,
    whole_steps,
)
from .schema import Settings
from .tokenizer_files import hugging_face_size, sentencepiece_size

BUILTIN_VOCABULARY = (2048, 16384)
"""Smallest and largest vocabulary that the built-in text is enough for."""


def check_data(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Files the data settings name exist."""
    data, vocab_size = settings.data, settings.model.vocab_size
    smallest, largest = BUILTIN_VOCABULARY
    if data.tokenizer is None and not smallest <= vocab_size <= largest:
        yield Problem(
            "model.vocab_size",
            vocab_size,
            "the built-in text cannot train a tokenizer of this size",
            f"choose {smallest} to {largest}, or name a tokenizer with data.tokenizer",
        )
    if data.tokenizer is not None:
        yield from check_tokenizer(data.tokenizer, vocab_size)
    if any(entry_paths(entry) for entry in data.blend) and data.tokenizer is None:
        yield Problem(
            "data.tokenizer",
            "null",
            "data.blend names datasets, which were made with some tokenizer",
            "name the tokenizer that they were made with",
        )
    yield from check_mixture(settings)
    yield from check_conversations(settings)
    yield from check_evaluation_sets(settings)
    evaluates = settings.schedule.evaluation_interval and not data.held_out_conversations
    if evaluates and data.held_out_percent == 0:
        yield Problem(
            "data.held_out_percent",
            data.held_out_percent,
            "leaves no text to evaluate on",
            "choose a share above 0, or schedule.evaluation_interval=0",
        )


def check_tokenizer(path: str, vocab_size: int) -> Iterator[Problem]:
    """The tokenizer can be read, and its ids are rows of the embedding."""
    if not Path(path).exists():
        yield Problem(
            "data.tokenizer",
            path,
            "no such file or folder",
            "give a SentencePiece .model file, or a folder with Hugging Face's tokenizer.json",
        )
        return
    is_folder = Path(path).is_dir()
    try:
        size = (hugging_face_size if is_folder else sentencepiece_size)(Path(path))
    except ValueError as error:
        remedy = "give a folder with tokenizer.json" if is_folder else "give a .model file"
        yield Problem("data.tokenizer", path, str(error), remedy)
        return
    # Published models pad their vocabulary beyond Hugging Face's tokenizer. A SentencePiece model
    # of another size than the vocabulary is the wrong one.
    if size > vocab_size or (size < vocab_size and not is_folder):
        yield Problem(
            "model.vocab_size",
            vocab_size,
            f"the tokenizer {path} has {size} {'ids' if is_folder else 'pieces'}",
            f"set model.vocab_size={size}, or name another tokenizer",
        )


def check_checkpoint(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Checkpoints can be found, fit the model, and can be written where they should go."""
    checkpoint = settings.checkpoint
    newest = newest_checkpoint(settings.checkpoint_dir)
    if checkpoint.load is not None and (damages := glance(Path(checkpoint.load))):
        yield Problem(
            "checkpoint.load",
            checkpoint.load,
            f"is not a whole checkpoint: {'; '.join(map(str, damages))}",
            f"name a step_… folder that holds {SETTINGS_FILE} and all the rest",
        )
    elif not checkpoint.resume and newest:
        yield Problem(
            "checkpoint.resume",
            "false",
            f"this run has a checkpoint already: {newest}",
            "choose another run_name to start anew, or checkpoint.resume=true to go on",
        )
    elif newest is None and (lost := lost_checkpoints(settings)):
        yield Problem(
            "checkpoint.directory",
            settings.checkpoint_dir,
            f"none of the run's checkpoints is whole: {'; '.join(lost)}",
            "put a copy of one of them back; or start from another checkpoint with"
            " checkpoint.load, or anew, under another run_name",
        )
    elif path := newest or checkpoint_to_start_from(settings):
        yield from check_saved_model(settings, path)
        if goes_on(settings):
            yield from check_position(settings, path)
    yield from check_expert_bias(settings)
    if checkpoint.load is None and checkpoint.load_what != "everything":
        yield Problem(
            "checkpoint.load_what",
            checkpoint.load_what,
            "checkpoint.load names no checkpoint to take it from",
            "set checkpoint.load",
        )
    if checkpoint.keep_every and checkpoint.save_interval == 0:
        yield Problem(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            "checkpoint.save_interval = 0 saves only at the end",
            "set checkpoint.save_interval",
        )
    elif checkpoint.keep_every and checkpoint.keep_every % checkpoint.save_interval:
        yield Problem(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            f"is not a multiple of checkpoint.save_interval = {checkpoint.save_interval}",
            "choose a multiple of it",
        )
    yield from check_saving(settings)
    for name, folder in (
        ("output_dir", settings.run_dir),
        ("checkpoint.directory", settings.checkpoint_dir),
        ("data.cache_dir", settings.data.cache_dir),
    ):
        path = Path(folder).absolute()
        existing = next(p for p in [path, *path.parents] if p.exists())
        if not existing.is_dir():
            yield Problem(name, folder, f"{existing} is a file", "name a folder")
        elif not os.access(existing, os.W_OK):
            yield Problem(name, folder, f"{existing} cannot be written to", "name another folder")


def lost_checkpoints(settings: Settings) -> list[str]:
    """Checkpoints of a run that has no other, each with what is wrong with it."""
    if settings.checkpoint.local_directory is not None:  # where a newer one may be whole
        return []
    directory = Path(settings.checkpoint_dir)
    paths = [whole_path(directory, step) for step in whole_steps(directory)]
    damaged = [f"{path.name} {glance(path)[0]}" for path in paths]
    return damaged + [f"{path.name} was put aside" for path in damaged_folders(directory)]


def check_saving(settings: Settings) -> Iterator[Problem]:
    """Settings of saving that need one another are set together."""
    checkpoint = settings.checkpoint
    if (checkpoint.local_directory is None) != (checkpoint.local_save_interval == 0):
        yield Problem(
            "checkpoint.local_directory, checkpoint.local_save_interval",
            f"{checkpoint.local_directory or 'null'}, {checkpoint.local_save_interval}",
            "one has no meaning without the other",
            "set both, or leave them at null and 0",
        )
    elif checkpoint.local_directory is not None:
        local, shared = Path(checkpoint.local_directory), Path(settings.checkpoint_dir)
        if shared.absolute() in (local.absolute(), *local.absolute().parents):
            yield Problem(
                "checkpoint.local_directory",
                checkpoint.local_directory,
                "lies in the folder of the run's checkpoints",
                "name a folder on a disk of the node",
            )
    if checkpoint.save_time_limit is not None and not checkpoint.asynchronous:
        yield Problem(
            "checkpoint.save_time_limit",
            checkpoint.save_time_limit,
            "only a checkpoint that is written in the background can be given up",
            "set checkpoint.asynchronous=true, or checkpoint.save_time_limit=null",
        )


def check_saved_model(settings: Settings, path: Path) -> Iterator[Problem]:
    """The checkpoint at `path` holds this model."""
    now = dataclasses.asdict(settings.model)
    # A checkpoint made before a setting existed was made with its default.
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(settings.model)
        if field.default is not dataclasses.MISSING
    }
    saved = {**now, **defaults, **read_settings(path)["model"]}
    differing = [
        field.name
        for field in dataclasses.fields(settings.model)
        if field.metadata.get("fixed_by_checkpoint") and saved[field.name] != now[field.name]
    ]
    if differing:
        without_mtp = (
            ", or leave the multi-token prediction layers out of the checkpoint with"
            " tools/convert_checkpoint.py (to-hf, then to-megatron --mtp drop)"
        )
        yield Problem(
            ", ".join(f"model.{name}" for name in differing),
            ", ".join(str(now[name]) for name in differing),
            f"the checkpoint {path} was made with "
            + ", ".join(str(saved[name]) for name in differing),
            "take those values, or another run_name to start anew"
            + (without_mtp if saved["num_mtp_layers"] and not now["num_mtp_layers"] else ""),
        )
