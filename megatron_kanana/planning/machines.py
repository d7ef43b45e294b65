"""GPUs and the machines they stand in: peak rates and sizes as their makers state them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_kanana.config import ConfigurationError, Problem


@dataclass(frozen=True)
class Machine:
    """One kind of GPU in one kind of cluster. Rates are peaks; `calibration` says what is reached.

    Attributes:
        name: for reports.
        bf16_flops: dense bf16 floating-point operations a second, without sparsity.
        fp8_flops: the same in fp8.
        memory_bytes: of one GPU, as a program sees it.
        memory_bandwidth: bytes a second between a GPU and its memory.
        nvlink_bandwidth: bytes a second that a GPU sends to the other GPUs of its node.
        network_bandwidth: bytes a second that a GPU sends to other nodes.
        gpus_per_node: GPUs that NVLink joins.
        disk_bandwidth: bytes a second that all nodes together write to shared storage.
        host_time: time its processors take to launch work, over that of the machine that
            `measured.SLICES` were measured on.
    """

    name: str
    bf16_flops: float
    fp8_flops: float
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    gpus_per_node: int
    disk_bandwidth: float
    host_time: float


# Dense rates are half of the data sheets' figures with sparsity. Memory: the total capacity that
# torch's messages state. NVLink: half of the data sheets' figures, which add both directions.
# Network: one ConnectX-7 of 400 Gbit/s a GPU, as in a DGX H100, H200 or B200 (DGX user guides).
# Disk: an assumption for the whole cluster; every one differs, so give your own.
# Host: fitted to the one published run that launching bounds, Qwen3-235B on 256 H100 with TP4, PP8
# and EP8 (measured.PUBLISHED), as nobody states it; the slices' machine is 1.
_NETWORK = 50e9
_DISK = 40e9
_HOST = 0.57

MACHINES: Mapping[str, Machine] = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5: 1979 TFLOP/s bf16 and 3958 fp8 with sparsity,
    # 80 GB at 3.35 TB/s, NVLink 900 GB/s.
    "h100": Machine(
        "h100", 989.5e12, 1979e12, 79.2 * 2**30, 3.35e12, 450e9, _NETWORK, 8, _DISK, _HOST
    ),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: rates of the H100, 141 GB at 4.8 TB/s.
    "h200": Machine(
        "h200", 989.5e12, 1979e12, 139.8 * 2**30, 4.8e12, 450e9, _NETWORK, 8, _DISK, _HOST
    ),
    # NVIDIA DGX B200 data sheet, one of its 8 GPUs: 72 PFLOP/s fp8 with sparsity in all, 180 GB at
    # 8 TB/s (64 TB/s in all), NVLink 1.8 TB/s. No number in calibration.py was measured on one.
    "b200": Machine(
        "b200", 2250e12, 4500e12, 178.3 * 2**30, 8.0e12, 900e9, _NETWORK, 8, _DISK, _HOST
    ),
}


def machine_named(name: str, own: Mapping[str, float] | None = None) -> Machine:
    """A shipped machine, with values of one's own.

    Args:
        name: key of `MACHINES`.
        own: other values by attribute, in the attributes' units.

    Raises:
        ConfigurationError: there is no such machine or attribute, or a value is not above zero.
    """
    problems: list[Problem] = []
    known = [field.name for field in dataclasses.fields(Machine) if field.name != "name"]
    if name not in MACHINES:
        remedy = f"choose {' or '.join(MACHINES)}, with --machine-value for what differs"
        problems.append(Problem("--machine", name, "is not described", remedy))
    for attribute, value in (own or {}).items():
        if attribute not in known:
            remedy = f"choose {' or '.join(known)}"
            problems.append(Problem("--machine-value", attribute, "is no value of one", remedy))
        elif not value > 0:
            problems.append(
                Problem(f"--machine-value {attribute}", value, "is not above 0", "give its size")
            )
    if problems:
        raise ConfigurationError(problems)
    changed = {
        attribute: int(value) if attribute == "gpus_per_node" else value
        for attribute, value in (own or {}).items()
    }
    return dataclasses.replace(MACHINES[name], **changed)  # type: ignore[arg-type]
