"""Choices made once, at start-up: a fast implementation or plain torch, and fp8 or not."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


def backend_or_torch(
    setting: str, requested: str, backend: str, found: str, error: Callable[[], str | None]
) -> tuple[str, str]:
    """The backend of operations that have one beside 'torch', and the reason.

    Args:
        setting: its name, such as 'kernels.moe_backend'.
        requested: its value: 'auto', `backend` or 'torch'.
        backend: the fast one.
        found: why it is taken by 'auto'.
        error: why it cannot be used here; None if it can.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    asked_for = f"asked for by {setting}"
    if requested == "torch":
        return requested, asked_for
    if (reason := error()) is not None:
        if requested == backend:
            raise RuntimeError(f"{setting} = {backend}: {reason}; or set it to auto")
        return "torch", reason
    return backend, found if requested == "auto" else asked_for


def fp8_or_not(
    setting: str, part: str, requested: str, device_type: str, error: Callable[[], str | None]
) -> bool:
    """Whether a part of the model is computed in fp8; a CPU leaves it out. The log says so.

    Args:
        setting: its name, such as 'precision.experts'.
        part: what it is about, for a person.
        requested: its value: 'bf16' or 'fp8'.
        device_type: 'cuda' or 'cpu'.
        error: why fp8 cannot be used here; None if it can.

    Raises:
        RuntimeError: fp8 was asked for and cannot be used here.
    """
    if requested == "bf16":
        return False
    if device_type == "cpu":
        logger.info("%s without fp8 (a CPU has none)", part)
        return False
    if (reason := error()) is not None:
        raise RuntimeError(f"{setting} = fp8: {reason}; or set it to bf16")
    logger.info("%s in fp8 (asked for by %s)", part, setting)
    return True
