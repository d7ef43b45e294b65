"""What checksums cost a save: this project's writing of a rank's part beside megatron-core's.

    python -m benchmarks.checkpoint_writing --folder /tmp/somewhere

Both write the same two files of tensors and wait until the disk has them, run after run in turn.
Then the files are verified. Writes the card checkpoint_writing_cpu.
"""

from __future__ import annotations

import argparse
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from benchmarks.card import Row, write_card
from megatron_kanana.checkpoint.parts import Bucket, WrittenPart, write_buckets
from megatron_kanana.checkpoint.verification import damage_of_files


def buckets(folder: Path, num_bytes: int) -> list[Bucket]:
    """Two files of fp32 matrices of 32 MiB, `num_bytes` in all."""
    generator = torch.Generator().manual_seed(0)
    count = max(num_bytes >> 26, 1)
    result: list[Bucket] = []
    for number in range(2):
        name = f"__0_{number}.distcp"
        tensors = [
            (_item(f"{number}.{index}"), torch.randn(2048, 4096, generator=generator))
            for index in range(count)
        ]
        result.append((str(folder / name), name, ([], tensors)))
    return result


def _item(name: str) -> WriteItem:
    size = torch.Size([2048, 4096])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    data = TensorWriteData(chunk, TensorProperties(torch.float32), size)
    return WriteItem(MetadataIndex(name, torch.Size([0, 0])), WriteItemType.SHARD, tensor_data=data)


def megatron_core(folder: Path, files: list[Bucket]) -> None:
    """Write as megatron-core does, with a process for each file."""
    transforms = FileSystemWriterAsync(folder).transforms
    results: Any = queue.SimpleQueue()
    FileSystemWriterAsync.write_preloaded_data_multiproc([transforms], False, 0, files, results)
    written = results.get()
    if isinstance(written, Exception):
        raise written


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> int:
    """Measure and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    ours: list[float] = []
    theirs: list[float] = []
    verifying: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "checkpoint"
        files = buckets(folder, options.megabytes << 20)
        part = WrittenPart()
        for _ in range(options.runs + 1):
            folder.mkdir()
            theirs.append(seconds(lambda: megatron_core(folder, files)))
            shutil.rmtree(folder)
            folder.mkdir()
            started = time.perf_counter()
            part = write_buckets(files)
            ours.append(time.perf_counter() - started)
            verifying.append(seconds(lambda: damage_of_files(folder, part.entries)))  # noqa: B023
            shutil.rmtree(folder)
        size = sum(entry.size for entry in part.entries.values())
    # The first of each warms up.
    write, peer, verify = (statistics.median(times[1:]) for times in (ours, theirs, verifying))
    rows = [
        Row(
            f"writing {size / 1e6:.0f} MB in two files, with checksums",
            "s",
            write,
            "megatron-core, without",
            peer,
            peer / write,
            options.runs,
        ),
        Row("writing", "GB/s", size / write / 1e9, runs=options.runs),
        Row("verifying, page cache", "GB/s", size / verify / 1e9, runs=options.runs),
    ]
    print(write_card("checkpoint_writing_cpu", rows))
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
