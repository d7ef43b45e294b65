"""Blocks of tensors in a `torch_dist` checkpoint, read and written without building a model.

megatron-core's format is torch.distributed.checkpoint's: `.metadata` says which file holds which
block of which tensor. The parts that plan, read and write are torch's; only what asks for blocks,
and gives them one at a time, is here.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter,
    _StorageInfo,  # the record that torch's reader expects in .metadata
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_kanana.device.safe_unpickling import SafeFileSystemReader

FORMAT_FILE = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core 0.16 writes beside the tensors to name their format."""

COMMON_FILE = "common.pt"

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    ImportError,
    IndexError,
    AssertionError,
    RuntimeError,
    pickle.UnpicklingError,
)
"""What torch raises over damaged files."""


@dataclass(frozen=True)
class Block:
    """A block of a tensor.

    Attributes:
        tensor: name of the tensor.
        tensor_shape: its whole shape.
        offset: where the block begins.
        shape: of the block.
        dtype: of the tensor.
    """

    tensor: str
    tensor_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class BlockReader:
    """Reads blocks of a checkpoint's tensors, whatever blocks they were saved in.

    Attributes:
        tensors: torch's description of each tensor, by name.

    Args:
        checkpoint: a whole checkpoint's folder.

    Raises:
        ValueError: says which file is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._reader = SafeFileSystemReader(checkpoint)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            stored = list(metadata.storage_data.values())
            entries = metadata.state_dict_metadata.items()
        except FileNotFoundError:
            raise ValueError(f"{checkpoint / '.metadata'} does not exist") from None
        except UNREADABLE as error:
            raise ValueError(f"{checkpoint / '.metadata'} cannot be read ({error})") from None
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)
        }
        self._check_sizes(stored)

    def _check_sizes(self, stored: Sequence[_StorageInfo]) -> None:
        ends: dict[str, int] = {}
        for info in stored:
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        for name, end in sorted(ends.items()):
            file = self.checkpoint / name
            if not file.is_file():
                raise ValueError(f"{file} does not exist")
            if file.stat().st_size < end:
                raise ValueError(f"{file} is cut short: {file.stat().st_size} bytes of {end}")

    def read(self, tensor: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A block, in the tensor's own format.

        Raises:
            ValueError: a file is damaged, or the checkpoint holds only a part of the block.
        """
        metadata = self.tensors[tensor]
        block = torch.empty(shape, dtype=metadata.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        items = create_read_items_for_chunk_list(tensor, metadata, [wanted])
        if sum(torch.Size(item.lengths).numel() for item in items) != block.numel():
            raise ValueError(f"{self.checkpoint} holds only a part of {tensor}")
        try:
            self._reader.read_data(LoadPlan(items), _IntoBlock(block)).wait()
        except UNREADABLE as error:
            raise ValueError(f"{self.checkpoint}: {tensor} cannot be read ({error})") from None
        return block


class _IntoBlock(DefaultLoadPlanner):
    """Has the reader copy every piece to its place in one block."""

    def __init__(self, block: torch.Tensor) -> None:
        super().__init__()
        self._block = block

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._block
        for axis, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(axis, start, size)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The piece is where it belongs already."""


class BlockWriter:
    """Writes a checkpoint of weights, a part at a time; a part is a file of some blocks.

    Args:
        folder: an existing folder.
        parts: the blocks of each file.
        read: gives each block's content.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Sequence[Block]],
        read: Callable[[Block], torch.Tensor],
    ) -> None:
        self.folder = folder
        self.parts = parts
        self._writer = FileSystemWriter(folder)
        self._read = read
        plans = [SavePlan([_write_item(block) for block in part]) for part in parts]
        self._plans = self._writer.prepare_global_plan(plans)

    def write(self, number: int) -> list[list[Any]]:
        """Write part `number`; returns, in plain values, where each of its blocks lies.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        blocks = {(block.tensor, torch.Size(block.offset)): block for block in self.parts[number]}
        contents = _FromBlocks(blocks, self._read)
        try:
            results = self._writer.write_data(self._plans[number], contents).wait()
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save ends with an error of its own
                raise error.__context__ from None
            raise
        found = {(result.index.fqn, result.index.offset): result for result in results}
        return [
            [info.relative_path, info.offset, info.length]
            for key in blocks
            for info in [found[key].storage_data]
        ]

    def finish(self, places: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Write `.metadata` and what else makes the folder a checkpoint.

        Args:
            places: what `write` returned for each part.
        """
        tensors: dict[str, TensorStorageMetadata] = {}
        results: list[WriteResult] = []
        for blocks, part in zip(self.parts, places, strict=True):
            for block, (file, offset, length) in zip(blocks, part, strict=True):
                item = _write_item(block)
                results.append(WriteResult(item.index, length, _StorageInfo(file, offset, length)))
                assert item.tensor_data is not None
                tensor = tensors.setdefault(
                    block.tensor,
                    TensorStorageMetadata(item.tensor_data.properties, item.tensor_data.size, []),
                )
                tensor.chunks.append(item.tensor_data.chunk)
        self._writer.finish(Metadata(dict(tensors)), [results])
        torch.save({"weights_only": True}, self.folder / COMMON_FILE)
        (self.folder / FORMAT_FILE).write_text(json.dumps(FORMAT))


class _FromBlocks(DefaultSavePlanner):
    """Gives the writer each block's content when it is about to write it, and not before."""

    def __init__(
        self,
        blocks: dict[tuple[str, torch.Size], Block],
        read: Callable[[Block], torch.Tensor],
    ) -> None:
        super().__init__()
        self._blocks = blocks
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        assert write_item.index.offset is not None
        return self._read(self._blocks[write_item.index.fqn, write_item.index.offset])


def _write_item(block: Block) -> WriteItem:
    offset = torch.Size(block.offset)
    return WriteItem(
        index=MetadataIndex(block.tensor, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offset, torch.Size(block.shape)),
            properties=TensorProperties(dtype=block.dtype),
            size=torch.Size(block.tensor_shape),
        ),
    )
