"""Files that would run code if they were trusted: each would make a file, which tests look for."""

from __future__ import annotations

import builtins
import dataclasses
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_kanana.config.manifest import MANIFEST_FILE, digest, manifest_bytes, read_manifest


class Calls:
    """Pickled, a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def calls(target: Path) -> dict[str, Calls]:
    """Calls that each make the file `target`, by name."""
    path = str(target)
    return {
        "open": Calls(builtins.open, path, "w"),
        "a command": Calls(os.system, f"touch {path}"),
        "eval": Calls(eval, f"open({path!r}, 'w')"),
        "exec": Calls(exec, f"open({path!r}, 'w')"),
        "an attribute": Calls(getattr, Calls(__import__, "os"), "system"),
        "torch's loader": Calls(torch.load, path),
    }


def pickled(thing: Any, protocol: int = 4) -> bytes:
    """As torch writes `.metadata`."""
    return pickle.dumps(thing, protocol)


def saved(thing: Any) -> bytes:
    """As torch.save writes objects."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def description(checkpoint: Path) -> Metadata:
    """A trusted checkpoint's own."""
    metadata: Metadata = FileSystemReader(checkpoint).read_metadata()
    return metadata


def hostile_copies(checkpoint: Path, folder: Path, target: Path) -> dict[str, Path]:
    """Copies of a checkpoint, each with one file that would make `target`, by what was changed."""
    metadata = description(checkpoint)
    entries = metadata.state_dict_metadata.items()
    an_object = next(name for name, entry in entries if isinstance(entry, BytesStorageMetadata))
    a_tensor = next(name for name, entry in entries if isinstance(entry, TensorStorageMetadata))

    def replace_stored(copy: Path, name: str) -> None:
        """Have the description point to a hostile object behind the end of a file."""
        changed = description(copy)
        assert changed.storage_data is not None
        for index, place in changed.storage_data.items():
            if index.fqn == name:
                content = saved(calls(target)["open"])
                file = copy / place.relative_path
                end = file.stat().st_size
                with file.open("ab") as appended:
                    appended.write(content)
                changed.storage_data[index] = dataclasses.replace(
                    place, offset=end, length=len(content)
                )
        (copy / ".metadata").write_bytes(pickled(changed))

    changes: dict[str, Callable[[Path], Any]] = {
        ".metadata": lambda copy: (copy / ".metadata").write_bytes(
            pickled(calls(target)["a command"])
        ),
        "inside .metadata": lambda copy: (copy / ".metadata").write_bytes(
            pickled(dataclasses.replace(metadata, planner_data=calls(target)["open"]))
        ),
        "common.pt": lambda copy: (copy / "common.pt").write_bytes(
            saved({"step": calls(target)["open"]})
        ),
        "an object": lambda copy: replace_stored(copy, an_object),
        "a tensor": lambda copy: replace_stored(copy, a_tensor),
    }
    copies = {}
    for number, (name, change) in enumerate(changes.items()):
        copies[name] = folder / f"hostile_{number}"
        shutil.copytree(checkpoint, copies[name])
        change(copies[name])
        _describe_anew(copies[name])
    return copies


def _describe_anew(checkpoint: Path) -> None:
    """Write the manifest that fits the changed files: it tells damage, not forgery."""
    entries = {name: digest(checkpoint / name) for name in read_manifest(checkpoint)}
    (checkpoint / MANIFEST_FILE).write_bytes(manifest_bytes(entries))
