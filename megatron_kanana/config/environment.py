"""The facts about this machine and this launch that a configuration is checked against."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

from megatron_kanana.native_library import NATIVE_LIBRARY

TESTED_MEGATRON_CORE = ("0.16.1", "0.19.2")
"""Versions of megatron-core that the test suite or a committed card ran on."""


@dataclass(frozen=True)
class Environment:
    """What the launcher and the machine offer.

    Attributes:
        world_size: processes of the job (torchrun's WORLD_SIZE).
        rank: this process (torchrun's RANK).
        local_world_size: processes of the job on this machine.
        cuda_device_count: CUDA devices this process can see.
        cuda_version: version of CUDA that torch is built with; None without.
        gpu_name: name of this process's GPU; None without.
        compute_capability: of this process's GPU, (9, 0) for Hopper; None without.
        megatron_core_version: installed version, or None.
        has_native_library: whether the compiled operations of csrc/ were built.
        has_cudnn_frontend: whether the package nvidia-cudnn-frontend is installed.
        transformer_engine_version: installed version of transformer-engine, or None.
        has_deep_ep: whether the package deep_ep is installed.
    """

    world_size: int = 1
    rank: int = 0
    local_world_size: int = 1
    cuda_device_count: int = 0
    cuda_version: str | None = "13.0"
    gpu_name: str | None = "NVIDIA H200"
    compute_capability: tuple[int, int] | None = (9, 0)
    megatron_core_version: str | None = TESTED_MEGATRON_CORE[0]
    has_native_library: bool = True
    has_cudnn_frontend: bool = True
    transformer_engine_version: str | None = "2.11.0"
    has_deep_ep: bool = True

    @property
    def has_transformer_engine(self) -> bool:
        """Whether the package transformer-engine is installed."""
        return self.transformer_engine_version is not None

    @property
    def has_cuda(self) -> bool:
        """Whether any CUDA device is visible."""
        return self.cuda_device_count > 0


def detect_environment() -> Environment:
    """Read the launcher's variables and look at the machine; starts and allocates nothing."""
    import torch

    devices = torch.cuda.device_count()
    device = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = device < devices  # else a launch of too many processes, which is answered later
    return Environment(
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        cuda_device_count=devices,
        cuda_version=torch.version.cuda,
        gpu_name=torch.cuda.get_device_name(device) if has_gpu else None,
        compute_capability=torch.cuda.get_device_capability(device) if has_gpu else None,
        megatron_core_version=_installed_version("megatron-core"),
        has_native_library=NATIVE_LIBRARY.is_file(),
        has_cudnn_frontend=importlib.util.find_spec("cudnn") is not None,
        transformer_engine_version=_installed_version("transformer-engine"),
        has_deep_ep=importlib.util.find_spec("deep_ep") is not None,
    )


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve_device(device: str, environment: Environment) -> str:
    """Turn `device=auto` into 'cuda' or 'cpu'."""
    if device == "auto":
        return "cuda" if environment.has_cuda else "cpu"
    return device


def resolve_precision(compute: str, device: str) -> str:
    """Turn `precision.compute=auto` into 'bf16' on CUDA or 'fp32' on a CPU."""
    if compute == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return compute


def resolve_fp8(fp8: str, device: str) -> str:
    """Turn `precision.fp8` into 'none' on a CPU, which has no fp8 arithmetic."""
    return fp8 if device == "cuda" else "none"
