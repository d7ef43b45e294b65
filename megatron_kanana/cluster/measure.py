"""Clocks and all-reduce bandwidths of nodes that are about to run together."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from .nodes import Measured, rounds

_PINGS = 5
_REPETITIONS = 5


@dataclass(frozen=True)
class Place:
    """Where a process is among those that measure.

    Attributes:
        nodes: names of the nodes, in order.
        node: number of the process's node in `nodes`.
        local_rank: number of the process on its node.
        processes: processes of each node.
    """

    nodes: tuple[str, ...]
    node: int
    local_rank: int
    processes: int

    @property
    def rank(self) -> int:
        """Number of the process."""
        return self.node * self.processes + self.local_rank

    def ranks(self, *nodes: int) -> list[int]:
        """Processes of some nodes."""
        return [
            n * self.processes + local for n in sorted(nodes) for local in range(self.processes)
        ]


def measure(place: Place, store: Store, num_bytes: int, timeout: float) -> Measured:
    """Measure this process's node; every process of every node in `place` must call this.

    Gloo on CPUs, NCCL where there are GPUs, one for each process.

    Args:
        store: where the processes meet.
        num_bytes: size of what each process reduces.
        timeout: seconds after which a collective operation is given up.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=len(place.nodes) * place.processes,
        timeout=datetime.timedelta(seconds=timeout),
    )
    clock = _clock_offset(place)
    inside = None
    if place.processes > 1:
        inside = _bandwidth(place.ranks(place.node), num_bytes, device)
    between: dict[str, float] = {}
    for pairs in rounds(len(place.nodes)):
        dist.barrier()
        for pair in pairs:
            if place.node in pair:
                other = place.nodes[pair[pair[0] == place.node]]
                between[other] = _bandwidth(place.ranks(*pair), num_bytes, device)
    return Measured(clock, inside, between)


def _clock_offset(place: Place) -> float:
    """Seconds this node's clock is ahead of the first node's, by the fastest of some exchanges."""
    if place.local_rank != 0:
        return 0.0
    first = place.ranks(0)[0]
    time_there = torch.zeros(1, dtype=torch.float64)
    if place.rank == first:
        for node in range(1, len(place.nodes)):
            for _ in range(_PINGS):
                dist.recv(time_there, place.ranks(node)[0])
                dist.send(time_there.fill_(time.time()), place.ranks(node)[0])
        return 0.0
    offsets = []
    for _ in range(_PINGS):
        begin, monotonic = time.time(), time.monotonic()
        dist.send(time_there, first)
        dist.recv(time_there, first)
        elapsed = time.monotonic() - monotonic
        offsets.append((elapsed, begin + elapsed / 2 - float(time_there)))
    return min(offsets)[1]


def _bandwidth(ranks: list[int], num_bytes: int, device: torch.device) -> float:
    """GB/s of an all-reduce over n processes: 2 (n - 1) / n of its bytes in its time."""
    group = dist.new_group(ranks, use_local_synchronization=True)
    data = torch.ones(num_bytes // 4, device=device)
    times = []
    for _ in range(1 + _REPETITIONS):
        data.fill_(1.0)
        _wait(device)
        dist.barrier(group)
        begin = time.monotonic()
        dist.all_reduce(data, group=group)
        _wait(device)
        times.append(time.monotonic() - begin)
    if not torch.all(data == len(ranks)):
        raise RuntimeError("the all-reduce gave a wrong sum")
    return 2 * (len(ranks) - 1) / len(ranks) * num_bytes / min(times[1:]) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
