"""Which implementation of the losses runs, and why."""

from __future__ import annotations

import logging

from ..choice import backend_or_torch
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


def _csrc_error(device_type: str) -> str | None:
    if (error := native_library_error()) is not None:
        return error
    if device_type == "cuda" and (error := hopper_error()) is not None:
        return error
    if not has_operation_for("cross_entropy_statistics", device_type.upper()):
        return f"the compiled operations have no losses for {device_type} (build them again)"
    return None
