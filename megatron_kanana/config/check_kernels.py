"""Implementations of our operations that the machine or the model cannot use."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_kanana.native_library import HOPPER_ATTENTION_WIDTHS

from .environment import Environment, resolve_device, resolve_precision
from .problems import Problem
from .schema import Settings


def check_kernels(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`kernels.backend` runs on this device, in this precision, with this model and data."""
    backend = settings.kernels.backend
    device = resolve_device(settings.device, environment)
    if backend == "csrc" and not environment.has_native_library:
        yield Problem(
            "kernels.backend",
            backend,
            "the compiled operations are not built",
            "run pip install --no-build-isolation -e . or choose another or auto",
        )
    if device == "cpu":
        if backend in ("cudnn", "te", "sdpa"):
            remedy = "choose csrc, torch or auto"
            yield Problem("kernels.backend", backend, "is for CUDA devices", remedy)
        return
    packages = {
        "cudnn": (environment.has_cudnn_frontend, "nvidia-cudnn-frontend[cutedsl]"),
        "te": (environment.has_transformer_engine, "transformer-engine[pytorch]"),
    }
    installed, package = packages.get(backend, (True, ""))
    if not installed:
        yield Problem(
            "kernels.backend",
            backend,
            f"{package} is not installed",
            f"run pip install '{package}' or choose csrc, sdpa or auto",
        )
    compute = resolve_precision(settings.precision.compute, device)
    if compute == "fp32" and backend in ("csrc", "cudnn", "te"):
        yield Problem(
            "kernels.backend",
            backend,
            "has no attention in precision.compute = fp32 on CUDA",
            "set precision.compute=bf16, or choose sdpa, torch or auto",
        )
    model = settings.model
    widths = (model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim)
    if backend == "csrc" and widths not in HOPPER_ATTENTION_WIDTHS:
        yield Problem(
            "kernels.backend",
            backend,
            f"model.qk_nope_head_dim + model.qk_rope_head_dim and model.v_head_dim are {widths}; "
            f"on CUDA it has {' '.join(map(str, HOPPER_ATTENTION_WIDTHS))}",
            "choose cudnn, sdpa or auto",
        )
    if backend == "te" and (settings.data.document_mask or settings.data.conversations):
        yield Problem(
            "kernels.backend",
            backend,
            "does not keep apart documents that share a sequence, which data.document_mask and "
            "data.conversations ask for",
            "choose csrc, cudnn, sdpa or auto",
        )
    if backend == "sdpa" and settings.kernels.deterministic:
        yield Problem(
            "kernels.deterministic",
            "true",
            "kernels.backend = sdpa has no deterministic gradients on CUDA",
            "choose kernels.backend=csrc, cudnn or torch",
        )
