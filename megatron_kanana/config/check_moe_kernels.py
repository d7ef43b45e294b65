"""Implementations of routing and experts that the machine or the model cannot use."""

from __future__ import annotations

from collections.abc import Iterator

from .environment import Environment, resolve_device, resolve_precision
from .expert_sizes import expert_layer_sizes
from .problems import Problem
from .schema import Settings


def check_moe_kernels(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`kernels.moe_backend` runs on this device, in this precision, with this model."""
    backend = settings.kernels.moe_backend
    if backend != "csrc":
        return
    if not environment.has_native_library:
        yield Problem(
            "kernels.moe_backend",
            backend,
            "the compiled operations are not built",
            "run pip install --no-build-isolation -e . or choose torch or auto",
        )
    device = resolve_device(settings.device, environment)
    if device == "cpu":
        return
    if resolve_precision(settings.precision.compute, device) == "fp32":
        yield Problem(
            "kernels.moe_backend",
            backend,
            "has no experts in precision.compute = fp32 on CUDA",
            "set precision.compute=bf16, or choose torch or auto",
        )
    for limit in expert_layer_sizes(settings).hopper_limits_passed():
        yield Problem(
            "kernels.moe_backend", backend, f"on CUDA it takes {limit}", "choose torch or auto"
        )
