"""Which implementation of the project's operations runs, and why."""

from __future__ import annotations

import functools
import logging

import torch

from megatron_kanana.config.environment import NATIVE_LIBRARY

logger = logging.getLogger(__name__)


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


def choose_backend(requested: str, device_type: str) -> str:
    """Pick the backend once, at start-up, and log the reason.

    Args:
        requested: `kernels.backend`: 'auto', 'csrc', 'sdpa' or 'torch'.
        device_type: 'cuda' or 'cpu'.

    Raises:
        RuntimeError: 'csrc' was asked for and the compiled operations cannot be used.
    """
    backend, reason = requested, "asked for by kernels.backend"
    if requested == "csrc" and (error := native_library_error()) is not None:
        raise RuntimeError(f"kernels.backend = csrc: {error}; or set kernels.backend=auto")
    if requested == "auto" and device_type == "cuda":
        backend, reason = "sdpa", "fused attention on CUDA"
    elif requested == "auto" and (error := native_library_error()) is not None:
        backend, reason = "torch", error
    elif requested == "auto":
        backend, reason = "csrc", "compiled operations found"
    logger.info("kernels: %s (%s)", backend, reason)
    return backend
