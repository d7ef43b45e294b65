"""Reading the pickles of a checkpoint without running what they name.

torch's distributed checkpoints keep their description, `.metadata`, as a pickle, and a pickle can
call anything that Python can import. The one here knows the records of the format and nothing
else. Everything else in a checkpoint goes through `torch.load`, which has a reader of its own for
files that are not trusted.
"""

from __future__ import annotations

import collections
import enum
import io
import os
import pickle
from pathlib import PosixPath, PurePath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from megatron_kanana.garbage_collection import garbage_collection_off

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
    # The folder's name, where it was given as a path; its module depends on Python's version.
    **{(module, "PosixPath"): PosixPath for module in ("pathlib", "pathlib._local")},
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
        pickle.UnpicklingError: it is damaged.
    """
    try:
        with garbage_collection_off():
            description = _Unpickler(io.BytesIO(stream.read()), name).load()
            whole = not isinstance(description, Metadata) or _is_whole(description)
    except (UnsafeFileError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle ends with errors of any class
        reason = str(error) or type(error).__name__
        raise pickle.UnpicklingError(f"{name} is damaged: {reason}") from None
    if not isinstance(description, Metadata):
        raise UnsafeFileError(f"{name} is not the description of a checkpoint{_REMEDY}")
    if not whole:
        raise pickle.UnpicklingError(f"{name} is damaged: its records lack something")
    for place in (description.storage_data or {}).values():
        file = PurePath(place.relative_path)
        if file.is_absolute() or ".." in file.parts:
            raise UnsafeFileError(f"{name} names {file}, outside its folder{_REMEDY}")
    return description


def _is_whole(description: Metadata) -> bool:
    """Whether the records that are read have what they are read for."""
    tensors = [
        entry
        for entry in description.state_dict_metadata.values()
        if not isinstance(entry, metadata.BytesStorageMetadata)
    ]
    sizes = [tensor.size for tensor in tensors]
    for tensor in tensors:
        sizes += [size for chunk in tensor.chunks for size in (chunk.offsets, chunk.sizes)]
    return (
        all(isinstance(size, torch.Size) for size in sizes)
        and all(isinstance(tensor.properties.dtype, torch.dtype) for tensor in tensors)
        and all(
            isinstance(index.fqn, str)
            and isinstance(place.relative_path, str)
            and isinstance(place.offset, int)
            and isinstance(place.length, int)
            for index, place in (description.storage_data or {}).items()
        )
    )


def force_weights_only() -> None:
    """Have every `torch.load` of this process, and of those it starts, refuse code.

    By torch's own switch, which also holds where a caller asks for the contrary, as torch's
    planner does for objects that are no tensors.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


_UNUSED_OPCODES = (
    *(pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.INST, pickle.OBJ, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
_REMEDY = ": nothing of it was run. Load checkpoints that this project has written"


_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):
    """The pickle of the standard library in Python, whose memory the file's size bounds.

    That in C takes what a damaged number asks for.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        opcode: load
        for opcode, load in _InPython.dispatch.items()
        if bytes([opcode]) not in _UNUSED_OPCODES
    }

    def __init__(self, stream: io.BytesIO, name: str) -> None:
        super().__init__(stream)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafeFileError(
                f"{self._name} names {module}.{name}, which is no part of a checkpoint{_REMEDY}"
            ) from None

    def load_build(self) -> None:
        """Set attributes: of records alone, not of the classes that the file names."""
        if not isinstance(self.stack[-2], RECORDS) or isinstance(self.stack[-2], enum.Enum):
            raise UnsafeFileError(f"{self._name} changes what is no record{_REMEDY}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
