"""Implementations of routing and experts that the machine or the model cannot use."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_kanana.native_library import HOPPER_EXPERT_WIDTH_UNIT

from .environment import Environment, resolve_device, resolve_precision
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
    hidden_size = settings.model.hidden_size
    width = settings.model.moe_ffn_hidden_size // settings.parallel.expert_tensor_parallel_size
    if hidden_size % HOPPER_EXPERT_WIDTH_UNIT or width % HOPPER_EXPERT_WIDTH_UNIT:
        yield Problem(
            "kernels.moe_backend",
            backend,
            f"on CUDA it takes multiples of {HOPPER_EXPERT_WIDTH_UNIT}; model.hidden_size is "
            f"{hidden_size}, and a process has {width} of an expert's width",
            "choose torch or auto",
        )
