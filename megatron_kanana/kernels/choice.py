"""The choice between a fast implementation and plain torch, once, at start-up."""

from __future__ import annotations

from collections.abc import Callable


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
