"""The files that one process writes of a checkpoint, with checksums of what was to be written.

megatron-core plans which process writes which pieces of which tensors; here they are written. Each
byte is taken into the checksum on its way to the file, so a file that a disk, a network or a
memory changes later differs from its checksum, and the writing costs no second reading.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what .metadata consists of
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from megatron_kanana.config.manifest import FileEntry

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""megatron-core's plan of a file: path, name, and (item, content) of objects and of tensors."""


@dataclass
class WrittenPart:
    """What a process has written.

    Attributes:
        results: where each piece of a tensor lies, for `.metadata`.
        entries: size and checksum of each file by name.
    """

    results: list[WriteResult] = field(default_factory=list)
    entries: dict[str, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A checkpoint that megatron-core has planned and nobody has written.

    Attributes:
        take_buckets: gives the files of this process, once, with their content in memory of the
            CPU.
        num_bytes: of the tensors of this process.
        common: what is the same on every process; the first one writes it.
        writer: writes `.metadata` on the first process.
        metadata: what `.metadata` says beside the places of the pieces; None elsewhere.
    """

    take_buckets: Callable[[], Sequence[Bucket]]
    num_bytes: int
    common: dict[str, Any]
    writer: StorageWriter
    metadata: Metadata | None


def plan(state: ShardedStateDict, folder: Path) -> Plan:
    """Divide a sharded state dict over the processes; every process must call this.

    Args:
        state: megatron-core's; it is used up.
        folder: an existing folder, on every process.
    """
    sharded, common = save_preprocess(state)
    strategy = _PlanningStrategy("torch_dist", 1)
    strategy.async_save(sharded, folder)
    writer, metadata = strategy.planned
    contents = [tensors for *_, (_, tensors) in writer.write_buckets]
    num_bytes = sum(tensor.nbytes for tensors in contents for _, tensor in tensors)

    def take_buckets() -> Sequence[Bucket]:
        taken, writer.write_buckets = writer.write_buckets, []  # frees what lies on a GPU
        copies: Sequence[Bucket] = writer.preload_tensors(taken)
        return copies

    return Plan(take_buckets, num_bytes, common, writer, metadata)


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's strategy up to the moment when it would write."""

    planned: tuple[Any, Metadata | None]

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, *rest: Any
    ) -> Any:
        _, metadata, _ = save_state_dict_ret
        self.planned = (writer, metadata)


def write_buckets(buckets: Sequence[Bucket]) -> WrittenPart:
    """Write files, two at a time, and wait until the disk has them.

    Raises:
        OSError: names the file that could not be written.
    """
    part = WrittenPart()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (_, name, _), (results, entry) in zip(
            buckets, pool.map(_write_bucket, buckets), strict=True
        ):
            part.results += results
            part.entries[name] = entry
    return part


def _write_bucket(bucket: Bucket) -> tuple[list[WriteResult], FileEntry]:
    path, name, (objects, tensors) = bucket
    results = []
    with ChecksummedFile(Path(path)) as file:
        for item, content in objects:
            start = file.size
            file.write(content.getbuffer())
            results.append(_result(item, name, start, file.size))
        for item, tensor in tensors:
            start = file.size
            file.save(tensor)
            results.append(_result(item, name, start, file.size))
    return results, file.entry


def _result(item: WriteItem, file: str, start: int, end: int) -> WriteResult:
    return WriteResult(item.index, end - start, _StorageInfo(file, start, end - start))


class ChecksummedFile:
    """A new file whose size and checksum are those of what is written to it.

    Leaving its `with` block waits until the disk has it.

    Attributes:
        size: bytes written.

    Raises:
        OSError: names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._checksum = hashlib.sha256()
        self._error: OSError | None = None
        self._file: IO[bytes]

    def __enter__(self) -> ChecksummedFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as found:
            if error is None:
                raise self._named(found) from None

    def write(self, content: Any) -> int:
        """As a file's."""
        if self._error is not None:  # torch's writer goes on after an error
            raise self._error
        view = memoryview(content)
        try:
            self._file.write(view)
        except OSError as error:
            self._error = self._named(error)
            raise
        self._checksum.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """As a file's; the end of the `with` block does it."""

    def save(self, content: Any) -> None:
        """Append what torch.save makes of `content`."""
        try:
            torch.save(content, cast(IO[bytes], self))  # it asks for write and flush alone
        except RuntimeError:
            if self._error is not None:  # torch ends with an error of its own
                raise self._error from None
            raise

    @property
    def entry(self) -> FileEntry:
        """Size and checksum of what was written."""
        return FileEntry(self.size, self._checksum.hexdigest())

    def _named(self, error: OSError) -> OSError:
        error.filename = str(self.path)
        return error


def gather_parts(part: WrittenPart) -> list[WrittenPart] | None:
    """The parts of all processes on the first one, None elsewhere; every process must call this."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(part, parts)
    return parts
