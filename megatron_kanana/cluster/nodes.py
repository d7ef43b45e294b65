"""What a node says of itself before a run, what was measured of it, and why it may be bad."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .record import output

GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """One node's answer.

    Attributes:
        gpus: CUDA devices a process sees.
        versions: of the GPU driver, NCCL, torch and Python; None where there is none.
        free_disk: GiB free by folder; a folder that cannot be written to is in `unwritable`.
        unwritable: the error by folder.
    """

    gpus: int = 0
    versions: dict[str, str | None] = field(default_factory=dict)
    free_disk: dict[str, float] = field(default_factory=dict)
    unwritable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was measured of one node.

    Attributes:
        clock: seconds its clock is ahead of the first node's.
        inside: GB/s of an all-reduce over its own processes; None with a single one.
        between: GB/s of an all-reduce with each neighbour, by the neighbour's name.
    """

    clock: float = 0.0
    inside: float | None = None
    between: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What a good node has, by `PreflightSettings`."""

    gpus: int
    minimum_free_disk: float
    maximum_clock_difference: float
    minimum_bandwidth: float


def look(folders: Sequence[str]) -> Node:
    """This node's answer; the folders are made where they are missing."""
    import platform

    import torch

    versions: dict[str, str | None] = {
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    gpus = torch.cuda.device_count()
    if gpus:
        drivers = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
        versions["driver"] = ", ".join(sorted(set(drivers.split()))) or None
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    free_disk: dict[str, float] = {}
    unwritable: dict[str, str] = {}
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"pre-flight")
            free_disk[folder] = shutil.disk_usage(folder).free / GIB
        except OSError as error:
            unwritable[folder] = str(error)
    return Node(gpus, versions, free_disk, unwritable)


def faults_of_answers(answers: Mapping[str, Node | None], wanted: Wanted) -> dict[str, list[str]]:
    """Why nodes are bad by what they say, or do not say; a good one has an empty list.

    Versions are compared with those of most nodes.

    Args:
        answers: by name of the node; None for one that gave none.
    """
    usual: dict[str, str | None] = {}
    for name in sorted({name for node in answers.values() if node for name in node.versions}):
        counts = Counter(node.versions.get(name) for node in answers.values() if node)
        usual[name] = counts.most_common(1)[0][0]
    return {
        name: ["gave no answer"] if node is None else list(_faults(node, usual, wanted))
        for name, node in answers.items()
    }


def _faults(node: Node, usual: Mapping[str, str | None], wanted: Wanted) -> list[str]:
    faults = [f"cannot write to {folder}: {why}" for folder, why in node.unwritable.items()]
    if node.gpus != wanted.gpus:
        faults.append(f"has {node.gpus} GPUs instead of {wanted.gpus}")
    faults += [
        f"has {node.versions.get(name)} as its version of {name}, most nodes have {version}"
        for name, version in usual.items()
        if node.versions.get(name) != version
    ]
    faults += [
        f"has {free:.1f} GiB free in {folder}, less than {wanted.minimum_free_disk:g}"
        for folder, free in node.free_disk.items()
        if free < wanted.minimum_free_disk
    ]
    return faults


def faults_of_measurements(
    measured: Mapping[str, Measured | None], wanted: Wanted
) -> dict[str, list[str]]:
    """Why nodes are bad by what was measured; a good one has an empty list.

    A node is slow if it is so with both of its neighbours: a good neighbour of a slow node is fast
    with its other one. Of two nodes alone, both are slow.

    Args:
        measured: by name of the node; None for one that did not finish.
    """
    clocks = [each.clock for each in measured.values() if each is not None]
    usual = statistics.median(clocks) if clocks else 0.0
    return {
        name: ["did not finish the all-reduce"]
        if each is None
        else list(_measured_faults(each, each.clock - usual, wanted))
        for name, each in measured.items()
    }


def _measured_faults(measured: Measured, clock: float, wanted: Wanted) -> list[str]:
    faults = []
    if abs(clock) > wanted.maximum_clock_difference:
        where = "ahead of" if clock > 0 else "behind"
        faults.append(f"its clock is {abs(clock):.2f} s {where} the middle of all")
    if measured.inside is not None and measured.inside < wanted.minimum_bandwidth:
        faults.append(
            f"reduces {measured.inside:.2f} GB/s over its own processes, less than"
            f" {wanted.minimum_bandwidth:g}"
        )
    if measured.between and max(measured.between.values()) < wanted.minimum_bandwidth:
        speeds = ", ".join(
            f"{speed:.2f} GB/s with {name}" for name, speed in measured.between.items()
        )
        faults.append(f"reduces {speeds}, less than {wanted.minimum_bandwidth:g}")
    return faults


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring of `count` nodes, in rounds where each node has one at most."""
    if count < 2:
        return []
    ring = [(index, (index + 1) % count) for index in range(count if count > 2 else 1)]
    even, odd = ring[: count - count % 2 : 2], ring[1 : count - count % 2 : 2]
    last = ring[-1:] if count % 2 else []
    return [pairs for pairs in (even, odd, last) if pairs]
