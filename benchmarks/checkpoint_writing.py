"""What checksums cost a save: this project's writing of a rank's part beside megatron-core's.

    python -m benchmarks.checkpoint_writing --name checkpoint_writing_cpu --folder /tmp/somewhere
    python -m benchmarks.checkpoint_writing --name checkpoint_writing_h100 --device cuda \
        --megabytes 2048 --folder /dev/shm

Both write the same two files of tensors and wait until the disk has them, run after run in turn.
Then the files are verified. With tensors on a GPU, a save in the background is timed as well: how
long training waits for it, until they are copied and the process that writes has started.
"""

from __future__ import annotations

import argparse
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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

from benchmarks.card import RESULTS_DIR, Row, write_card
from megatron_kanana.checkpoint.background import Work
from megatron_kanana.checkpoint.parts import Bucket, WrittenPart, write_buckets
from megatron_kanana.checkpoint.verification import damage_of_files


def buckets(folder: Path, num_bytes: int, device: str) -> list[Bucket]:
    """Two files of fp32 matrices of 32 MiB, `num_bytes` in all."""
    generator = torch.Generator(device).manual_seed(0)
    count = max(num_bytes >> 26, 1)
    result: list[Bucket] = []
    for number in range(2):
        name = f"__0_{number}.distcp"
        tensors = [
            (
                _item(f"{number}.{index}"),
                torch.randn(2048, 4096, generator=generator, device=device),
            )
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


@dataclass
class Times:
    """Seconds of each run.

    Attributes:
        ours, theirs: writing files from memory.
        verifying: reading what was written.
        copying: tensors of a GPU into memory of the host.
        waiting: until training can go on beside a save in the background.
        blocking: of a save that training waits for, copies included.
    """

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    verifying: list[float] = field(default_factory=list)
    copying: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    blocking: list[float] = field(default_factory=list)


def measure(folder: Path, files: Sequence[Bucket], runs: int, times: Times) -> WrittenPart:
    """Write from memory in both ways, in turn, and verify; returns what was written."""
    part = WrittenPart()
    for _ in range(runs + 1):
        folder.mkdir()
        times.theirs.append(seconds(lambda: megatron_core(folder, list(files))))
        shutil.rmtree(folder)
        folder.mkdir()
        started = time.perf_counter()
        part = write_buckets(files)
        times.ours.append(time.perf_counter() - started)
        entries = part.entries
        times.verifying.append(seconds(lambda: damage_of_files(folder, entries)))  # noqa: B023
        shutil.rmtree(folder)
    return part


def measure_beside_training(folder: Path, files: Sequence[Bucket], runs: int, times: Times) -> None:
    """Save tensors of a GPU in the background and at once, in turn.

    Raises:
        RuntimeError: the process that writes has failed, or writes something else.
    """
    expected = None
    for _ in range(runs + 1):
        folder.mkdir()
        torch.cuda.synchronize()
        started = time.perf_counter()
        copies = FileSystemWriterAsync.preload_tensors(list(files))
        times.copying.append(time.perf_counter() - started)
        work = Work(partial(write_buckets, copies), background=True)
        times.waiting.append(time.perf_counter() - started)
        while (outcome := work.outcome()) is None:
            time.sleep(0.01)
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        shutil.rmtree(folder)
        folder.mkdir()
        torch.cuda.synchronize()
        started = time.perf_counter()
        part = write_buckets(FileSystemWriterAsync.preload_tensors(list(files)))
        times.blocking.append(time.perf_counter() - started)
        shutil.rmtree(folder)
        expected = expected or part.entries
        if not expected == part.entries == outcome.result.entries:
            raise RuntimeError("what was written in the background is something else")


def main() -> int:
    """Measure and write the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="checkpoint_writing_cpu", help="name of the card")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the tensors")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    times = Times()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "checkpoint"
        files: Sequence[Bucket] = buckets(folder, options.megabytes << 20, options.device)
        if options.device == "cuda":
            measure_beside_training(folder, files, options.runs, times)
            files = FileSystemWriterAsync.preload_tensors(list(files))
        part = measure(folder, files, options.runs, times)
    size = sum(entry.size for entry in part.entries.values())
    rows = rows_of(times, size, options.runs)
    print(write_card(options.name, rows, options.results_dir))
    for row in rows:
        print(row)
    return 0


def rows_of(times: Times, size: int, runs: int) -> list[Row]:
    """The card's rows; the first run of each kind warms up.

    Args:
        size: bytes that a run writes.
    """

    def median(values: list[float]) -> float:
        return statistics.median(values[1:])

    write, peer = median(times.ours), median(times.theirs)
    title = f"writing {size / 1e6:.0f} MB in two files, with checksums"
    rows = [
        Row(title, "s", write, "megatron-core, without", peer, peer / write, runs),
        Row("writing", "GB/s", size / write / 1e9, runs=runs),
        Row("verifying, page cache", "GB/s", size / median(times.verifying) / 1e9, runs=runs),
    ]
    if times.waiting:
        waiting, blocking = median(times.waiting), median(times.blocking)
        title = "training waits for a save in the background"
        peer_name = "for one that is not"
        rows += [
            Row(title, "s", waiting, peer_name, blocking, blocking / waiting, runs),
            Row("copying from the GPU", "GB/s", size / median(times.copying) / 1e9, runs=runs),
            Row("the first copy, which locks the pages", "GB/s", size / times.copying[0] / 1e9),
        ]
    return rows


if __name__ == "__main__":
    sys.exit(main())
