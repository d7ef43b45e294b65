"""Which implementation of attention runs, and why."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import torch

from megatron_kanana.native_library import HOPPER_ATTENTION_WIDTHS

from .native import has_operation_for, hopper_error, native_library_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backends:
    """Which implementations a model computes with.

    Attributes:
        attention: of `kernels.attention`.
        experts: of `kernels.moe`.
        linear: of the dense linear layers, 'te' or 'torch'.
        rope: of rotary embeddings, 'triton' or 'torch'.
        norm: of norms and of the embedding's gradient, 'csrc' or 'torch'.
        loss: of `kernels.linear_cross_entropy`.
        experts_fp8: whether experts are computed in fp8 (`kernels.moe.fp8`).
        output_layer_fp8: whether the output layer's products are in fp8 in training.
    """

    attention: str
    experts: str
    linear: str = "torch"
    rope: str = "torch"
    norm: str = "torch"
    loss: str = "torch"
    experts_fp8: bool = False
    output_layer_fp8: bool = False


REFERENCE = Backends(attention="torch", experts="torch")
"""Plain torch, for every device."""

_PACKAGES = {
    "cudnn": ("cudnn.flex_attention", "nvidia-cudnn-frontend[cutedsl]"),
    "te": ("transformer_engine.pytorch", "transformer-engine[pytorch]"),
}


def choose_backend(
    requested: str,
    device_type: str,
    *,
    dtype: torch.dtype,
    widths: tuple[int, int],
    deterministic: bool = False,
) -> str:
    """Pick the backend of attention once, at start-up, and log the reason.

    Args:
        requested: `kernels.backend`: 'auto', 'csrc', 'cudnn', 'te', 'sdpa' or 'torch'.
        device_type: 'cuda' or 'cpu'.
        dtype: what attention is computed in.
        widths: of query and key, and of value, a head.
        deterministic: `kernels.deterministic`.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    if requested == "auto":
        error = _csrc_error(device_type, dtype, widths)
        other = "torch" if device_type == "cpu" or deterministic else "sdpa"
        backend, reason = ("csrc", "compiled operations found") if error is None else (other, error)
    else:
        backend, reason = requested, "asked for by kernels.backend"
        error = _error(requested, device_type, dtype, widths)
        if error is not None:
            raise RuntimeError(f"kernels.backend = {requested}: {error}; or set it to auto")
    logger.info("kernels: %s (%s)", backend, reason)
    return backend


def _error(
    backend: str, device_type: str, dtype: torch.dtype, widths: tuple[int, int]
) -> str | None:
    """Why the backend cannot be used here; None if it can."""
    if backend == "csrc":
        return _csrc_error(device_type, dtype, widths)
    if backend in _PACKAGES:
        module, package = _PACKAGES[backend]
        if not _is_installed(module):
            return f"{package} is not installed, or too old (pip install --upgrade '{package}')"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package it is in
        return False


def _csrc_error(device_type: str, dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    if (error := native_library_error()) is not None:
        return error
    if device_type == "cuda":
        if (error := hopper_error()) is not None:
            return error
        if dtype != torch.bfloat16:
            return f"the CUDA kernels compute in bfloat16, not {dtype}"
        if widths not in HOPPER_ATTENTION_WIDTHS:
            return f"the CUDA kernels have no widths {widths}"
    if not has_operation_for("flash_attention_forward", device_type.upper()):
        return f"the compiled operations have no attention for {device_type} (build them again)"
    return None
