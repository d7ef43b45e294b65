"""Which implementation of the losses runs, and why."""

from __future__ import annotations

import logging

from ..choice import backend_or_torch, fp8_or_not
from ..native import has_operation_for, hopper_error, native_library_error

logger = logging.getLogger(__name__)


def choose_loss_backend(requested: str, device_type: str) -> str:
    """Pick the backend of `linear_cross_entropy` once, at start-up, and log the reason.

    Args:
        requested: `kernels.loss_backend`: 'auto', 'csrc' or 'torch'.
        device_type: 'cuda' or 'cpu'.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    backend, reason = backend_or_torch(
        "kernels.loss_backend",
        requested,
        "csrc",
        "compiled operations found",
        lambda: _csrc_error(device_type),
    )
    logger.info("kernels of the loss: %s (%s)", backend, reason)
    return backend


def choose_fp8_output_layer(requested: str, backend: str, device_type: str) -> bool:
    """Whether the output layer's products are in fp8 in training; a CPU leaves it out.

    Args:
        requested: `precision.output_layer`: 'bf16' or 'fp8'.
        backend: of the losses.
        device_type: 'cuda' or 'cpu'.

    Raises:
        RuntimeError: fp8 was asked for and cannot be used here.
    """
    return fp8_or_not(
        "precision.output_layer",
        "output layer",
        requested,
        device_type,
        lambda: _fp8_error(backend),
    )


def _fp8_error(backend: str) -> str | None:
    if backend != "csrc":
        return f"kernels.loss_backend is {backend}, and csrc alone has fp8"
    if not has_operation_for("cross_entropy_gradient_fp8", "CUDA"):
        return "the compiled operations have no losses in fp8 (build them again)"
    return None


def _csrc_error(device_type: str) -> str | None:
    if (error := native_library_error()) is not None:
        return error
    if device_type == "cuda" and (error := hopper_error()) is not None:
        return error
    if not has_operation_for("cross_entropy_statistics", device_type.upper()):
        return f"the compiled operations have no losses for {device_type} (build them again)"
    return None
