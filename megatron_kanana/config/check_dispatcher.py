"""Ways of sending tokens to their experts that the machine or the layout cannot use."""

from __future__ import annotations

from collections.abc import Iterator

from .environment import Environment, resolve_device, resolve_precision
from .problems import Problem
from .schema import Settings


def check_dispatcher(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`parallel.token_dispatcher` is installed, and for this device, precision and layout."""
    dispatcher = settings.parallel.token_dispatcher
    if dispatcher != "deepep":
        return
    name, other = "parallel.token_dispatcher", "choose alltoall"
    device = resolve_device(settings.device, environment)
    if device == "cpu":
        yield Problem(name, dispatcher, "is for CUDA devices", other)
        return
    if not environment.has_deep_ep:
        remedy = f"install DeepEP (https://github.com/deepseek-ai/DeepEP), or {other}"
        yield Problem(name, dispatcher, "the package deep_ep is not installed", remedy)
    if resolve_precision(settings.precision.compute, device) == "fp32":
        reason = "sends bf16, not precision.compute = fp32"
        yield Problem(name, dispatcher, reason, f"set precision.compute=bf16, or {other}")
    parts = settings.parallel.expert_tensor_parallel_size
    if parts > 1:
        reason = f"takes no experts in parallel.expert_tensor_parallel_size = {parts} parts"
        remedy = f"set parallel.expert_tensor_parallel_size=1, or {other}"
        yield Problem(name, dispatcher, reason, remedy)
