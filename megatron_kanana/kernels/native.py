"""The compiled operations of csrc/: loading them, and what they were compiled for."""

from __future__ import annotations

import functools

import torch

from megatron_kanana.native_library import NATIVE_LIBRARY


@functools.cache
def native_library_error() -> str | None:
    """Load the compiled operations once; None on success, else why they cannot be used."""
    if not NATIVE_LIBRARY.is_file():
        return f"{NATIVE_LIBRARY.name} is not built (pip install --no-build-isolation -e .)"
    try:
        torch.ops.load_library(str(NATIVE_LIBRARY))
    except OSError as error:
        return f"{NATIVE_LIBRARY.name} cannot be loaded: {error}"
    return None


def load_native_operations(setting: str = "kernels.backend") -> None:
    """Load the compiled operations.

    Args:
        setting: the setting that asked for them.

    Raises:
        RuntimeError: they cannot be used.
    """
    if (error := native_library_error()) is not None:
        raise RuntimeError(f"{setting} = csrc: {error}; or set {setting}=auto")


def hopper_error() -> str | None:
    """Why CUDA kernels for Hopper cannot run on the current device; None if they can."""
    if torch.cuda.get_device_capability() == (9, 0):
        return None
    return f"{torch.cuda.get_device_name()} is no Hopper GPU (compute capability 9.0)"


def has_operation_for(operation: str, dispatch_key: str) -> bool:
    """Whether the loaded library holds the operation for 'CPU' or 'CUDA'."""
    return hasattr(torch.ops.megatron_kanana, operation) and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(
            f"megatron_kanana::{operation}", dispatch_key
        )
    )
