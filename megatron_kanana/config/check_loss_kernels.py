"""Implementations of the output layer's losses that the machine cannot use."""

from __future__ import annotations

from collections.abc import Iterator

from .environment import Environment
from .problems import Problem
from .schema import Settings


def check_loss_kernels(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`kernels.loss_backend` is built."""
    backend = settings.kernels.loss_backend
    if backend == "csrc" and not environment.has_native_library:
        yield Problem(
            "kernels.loss_backend",
            backend,
            "the compiled operations are not built",
            "run pip install --no-build-isolation -e . or choose torch or auto",
        )
