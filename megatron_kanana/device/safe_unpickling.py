"""Reading the pickles of a checkpoint without running what they name.

torch's distributed checkpoints keep their description, `.metadata`, as a pickle, and a pickle can
call anything that Python can import. The one here knows the records of the format and nothing
else. Everything else in a checkpoint goes through `torch.load`, which has a reader of its own for
files that are not trusted.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

RECORDS: tuple[type, ...] = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.MetadataIndex,
    metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING,
    metadata.StorageMeta,
    filesystem._StorageInfo,
    planner.SavePlan,
    planner.WriteItem,
    planner.WriteItemType,
    planner.TensorWriteData,
)
"""What torch and megatron-core write into `.metadata`."""

_BUILT_IN: tuple[Any, ...] = (collections.OrderedDict, torch.Size, _get_layout)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(each.__module__, each.__qualname__): each for each in (*RECORDS, *_BUILT_IN)},
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
}


class UnsafeFileError(ValueError):
    """Raised for a file that names code, or that is not what its place says."""


class SafeFileSystemReader(FileSystemReader):
    """torch's reader of a checkpoint's folder, with `.metadata` read by `load_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of the checkpoint.

        Raises:
            UnsafeFileError: it names code, or files outside the folder.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            description = load_metadata(stream, str(path))
        if getattr(description, "storage_meta", None) is None:
            description.storage_meta = metadata.StorageMeta()
        assert description.storage_meta is not None
        description.storage_meta.load_id = self.load_id
        return description


def load_metadata(stream: io.IOBase, name: str) -> Metadata:
    """The description of a checkpoint in an open `.metadata`.

    Args:
        stream: the file.
        name: what to call it in errors.

    Raises:
        UnsafeFileError: it names code or files outside its folder, or is something else.
        pickle.UnpicklingError, EOFError and others: it is damaged.
    """
    # A pickle may set attributes also of the classes that it names.
    before = [dict(vars(record)) for record in RECORDS]
    try:
        description = _Unpickler(stream, name).load()
    finally:
        changed = [
            _restore(record, content)
            for record, content in zip(RECORDS, before, strict=True)
            if dict(vars(record)) != content
        ]
    if changed or not isinstance(description, Metadata):
        raise UnsafeFileError(f"{name} is not the description of a checkpoint{_REMEDY}")
    for place in (description.storage_data or {}).values():
        file = PurePath(place.relative_path)
        if file.is_absolute() or ".." in file.parts:
            raise UnsafeFileError(f"{name} names {file}, outside its folder{_REMEDY}")
    return description


def force_weights_only() -> None:
    """Have every `torch.load` of this process, and of those it starts, refuse code.

    By torch's own switch, which also holds where a caller asks for the contrary, as torch's
    planner does for objects that are no tensors.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


_REMEDY = ": nothing of it was run. Load checkpoints that this project has written"


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.IOBase, name: str) -> None:
        super().__init__(stream)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafeFileError(
                f"{self._name} names {module}.{name}, which is no part of a checkpoint{_REMEDY}"
            ) from None


def _restore(record: type, content: dict[str, Any]) -> type:
    for name in set(vars(record)) - set(content):
        delattr(record, name)
    for name, value in content.items():
        if vars(record).get(name) is not value:
            setattr(record, name, value)
    return record
