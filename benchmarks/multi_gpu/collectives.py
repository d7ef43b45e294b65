"""All-to-alls: replaced by copies on the process itself, recorded, and timed by themselves."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of rows.

    Attributes:
        row_bytes: of a row.
        sent, received: rows to and from each process.
    """

    row_bytes: int
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def bytes_to_others(self) -> int:
        """What this process sends away."""
        own = self.sent[dist.get_rank()]
        return self.row_bytes * (sum(self.sent) - own)


class _Done:
    """Stands for the handle of a collective that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def local_copies() -> Iterator[None]:
    """Inside, nothing of the experts travels: each process takes others to send what it would.

    Rows, their number and their experts are then those of a process whose neighbours all have its
    own tokens, so that as much is computed as with balanced loads, and nobody is waited for. All
    processes are one group of expert parallelism.
    """
    from megatron.core.tensor_parallel import mappings

    with (
        mock.patch.object(dist, "all_to_all_single", _copy_rows),
        mock.patch.object(dist, "all_gather_into_tensor", _copy_gathered),
        mock.patch.object(mappings, "dist_all_gather_func", _copy_gathered),
        mock.patch.object(mappings, "dist_reduce_scatter_func", _copy_scattered),
    ):
        yield


def _copy_rows(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> _Done | None:
    processes = dist.get_world_size(group)
    rank = dist.get_rank(group)
    into = output.split(_rows_of_parts(output, output_split_sizes, processes))
    parts = input.split(_rows_of_parts(input, input_split_sizes, processes))
    # On the way there all take the own part; on the way back parts have the sizes of the answers.
    there = all(len(each) == len(parts[rank]) for each in into)
    for index, part in enumerate(into):
        source = parts[rank] if there else parts[index]
        rows = min(len(part), len(source))
        part[:rows].copy_(source[:rows])
        part[rows:].zero_()
    return _Done() if async_op else None


def _rows_of_parts(rows: torch.Tensor, sizes: Sequence[int] | None, processes: int) -> list[int]:
    """Of each process; megatron-core's dispatcher on a GPU gives an array of numpy."""
    if sizes is None or not len(sizes):
        return [len(rows) // processes] * processes
    return [int(size) for size in sizes]


def _copy_gathered(
    output: torch.Tensor, input: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    for part in output.chunk(dist.get_world_size(group)):
        part.copy_(input.view_as(part))
    return _Done() if async_op else None


def _copy_scattered(
    output: torch.Tensor, input: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    output.copy_(input.chunk(dist.get_world_size(group))[dist.get_rank(group)].view_as(output))
    return _Done() if async_op else None


@contextlib.contextmanager
def recorded(found: list[Exchange]) -> Iterator[None]:
    """Inside, sizes of all-to-alls are noted."""
    original = dist.all_to_all_single

    def record(output: torch.Tensor, input: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        received, sent = arguments[:2]
        row = input[0].numel() if len(input) else output[:1].numel()
        found.append(Exchange(row * input.element_size(), tuple(sent), tuple(received)))
        return original(output, input, *arguments, **named)

    with mock.patch.object(dist, "all_to_all_single", record):
        yield


def gigabytes_a_second(
    exchanges: list[Exchange], device: torch.device, repeats: int, *, even: bool
) -> float:
    """Bytes that leave a process, over the time of the slowest, for exchanges one after another.

    Args:
        exchanges: what is sent.
        device: of the tensors.
        repeats: how often; the median counts.
        even: the same bytes in equal parts, as nccl-tests sends them.
    """
    processes = dist.get_world_size()
    jobs: list[Callable[[], Any]] = []
    total = 0
    rows_of_all = torch.tensor([sum(each.sent) for each in exchanges], device=device)
    dist.all_reduce(rows_of_all)
    for each, of_all in zip(exchanges, rows_of_all.tolist(), strict=True):
        rows = of_all // processes**2
        sent = [rows] * processes if even else list(each.sent)
        received = [rows] * processes if even else list(each.received)
        source = torch.ones(sum(sent), each.row_bytes, dtype=torch.uint8, device=device)
        target = source.new_empty(sum(received), each.row_bytes)
        total += each.row_bytes * (sum(sent) - sent[dist.get_rank()])
        jobs.append(partial(dist.all_to_all_single, target, source, received, sent))
    sums = torch.tensor(float(total), device=device)
    dist.all_reduce(sums)
    times = [seconds_of_all(jobs, device) for _ in range(repeats + 1)][1:]
    return float(sums) / processes / statistics.median(times) / 1e9


def seconds_of_all(functions: list[Callable[[], Any]], device: torch.device) -> float:
    """Seconds from a common beginning until the slowest process has done all, without waits."""
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for function in functions:
        function()
    synchronize(device)
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
