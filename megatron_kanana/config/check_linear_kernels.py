"""Implementations of linear layers, rotary embeddings and norms that cannot be used here."""

from __future__ import annotations

from collections.abc import Iterator

from .environment import Environment, resolve_device, resolve_fp8, resolve_precision
from .norm_sizes import norm_limits_passed
from .problems import Problem
from .rotary_sizes import fused_rope_limits_passed
from .schema import Settings


def check_linear_kernels(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`kernels.linear_backend` runs on this device, and in this precision."""
    backend = settings.kernels.linear_backend
    device = resolve_device(settings.device, environment)
    name = "kernels.linear_backend"
    if backend == "torch" and resolve_fp8(settings.precision.fp8, device) != "none":
        yield Problem(
            name,
            backend,
            f"has no fp8, which precision.fp8 = {settings.precision.fp8} asks for",
            "choose te or auto, or set precision=bf16",
        )
    if backend != "te":
        return
    if device == "cpu":
        yield Problem(name, backend, "is for CUDA devices", "choose torch or auto")
    elif not environment.has_transformer_engine:
        package = "transformer-engine[pytorch]"
        remedy = f"run pip install '{package}' or choose torch or auto"
        yield Problem(name, backend, f"{package} is not installed", remedy)


def check_rope_kernels(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`kernels.rope_backend` runs on this device, in this precision, with this model."""
    backend = settings.kernels.rope_backend
    if backend != "triton":
        return
    name = "kernels.rope_backend"
    yield from _check_bf16_on_gpus(settings, environment, name, backend, "CUDA devices")
    if settings.kernels.deterministic:
        reason = "sums over heads in an order that is chosen by timing"
        yield Problem(name, backend, reason, f"set kernels.deterministic=false, or {_OTHERS}")
    for limit in fused_rope_limits_passed(settings):
        yield Problem(name, backend, f"takes {limit}", _OTHERS)


def check_norm_kernels(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`kernels.norm_backend` is built, and runs on this device, in this precision, this model."""
    backend = settings.kernels.norm_backend
    if backend != "csrc":
        return
    name = "kernels.norm_backend"
    yield from _check_bf16_on_gpus(settings, environment, name, backend, "Hopper GPUs")
    if not environment.has_native_library:
        build = f"run pip install --no-build-isolation -e . or {_OTHERS}"
        yield Problem(name, backend, "the compiled operations are not built", build)
    for limit in norm_limits_passed(settings):
        yield Problem(name, backend, f"takes {limit}", _OTHERS)


_OTHERS = "choose torch or auto"


def _check_bf16_on_gpus(
    settings: Settings, environment: Environment, name: str, backend: str, devices: str
) -> Iterator[Problem]:
    device = resolve_device(settings.device, environment)
    if device == "cpu":
        yield Problem(name, backend, f"is for {devices}", _OTHERS)
    elif resolve_precision(settings.precision.compute, device) == "fp32":
        reason = "is for bf16, not precision.compute = fp32"
        yield Problem(name, backend, reason, f"set precision.compute=bf16, or {_OTHERS}")
