"""Which implementations of linear layers, rotary embeddings and norms run, and why."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable

import torch

from .choice import backend_or_torch
from .native import has_operation_for, hopper_error, native_library_error

logger = logging.getLogger(__name__)


def choose_linear_backend(
    requested: str, device_type: str, *, dtype: torch.dtype, fp8: str = "none"
) -> str:
    """Pick the backend of the dense linear layers once, at start-up, and log the reason.

    Args:
        requested: `kernels.linear_backend`: 'auto', 'te' or 'torch'.
        device_type: 'cuda' or 'cpu'.
        dtype: of weights and activations.
        fp8: `precision.fp8`; a CPU has no fp8 arithmetic and leaves it out.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    backend, reason = backend_or_torch(
        "kernels.linear_backend",
        requested,
        "te",
        "transformer-engine found",
        lambda: _transformer_engine_error(device_type, dtype),
    )
    form = str(dtype).removeprefix("torch.")
    if fp8 == "none":
        said = f"in {form}"
    elif device_type == "cpu":
        said = f"in {form}: precision.fp8 = {fp8} is left out, a CPU has no fp8"
    else:
        said = f"in fp8, {fp8}"
        if backend != "te":
            raise RuntimeError(f"precision.fp8 = {fp8}: {reason}; or set precision=bf16")
    logger.info("linear layers: %s (%s), %s", backend, reason, said)
    return backend


def choose_rope_backend(
    requested: str,
    device_type: str,
    *,
    dtype: torch.dtype,
    limits_passed: Iterable[str],
    deterministic: bool = False,
) -> str:
    """Pick the backend of rotary embeddings once, at start-up, and log the reason.

    Args:
        requested: `kernels.rope_backend`: 'auto', 'triton' or 'torch'.
        device_type: 'cuda' or 'cpu'.
        dtype: of activations.
        limits_passed: what the kernel does not take of the model.
        deterministic: `kernels.deterministic`.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    backend, reason = backend_or_torch(
        "kernels.rope_backend",
        requested,
        "triton",
        "triton found",
        lambda: _triton_error(device_type, dtype, limits_passed, deterministic=deterministic),
    )
    logger.info("rotary embeddings: %s (%s)", backend, reason)
    return backend


def choose_norm_backend(
    requested: str, device_type: str, *, dtype: torch.dtype, limits_passed: Iterable[str]
) -> str:
    """Pick the backend of norms and the embedding's gradient once, at start-up, and say why.

    Args:
        requested: `kernels.norm_backend`: 'auto', 'csrc' or 'torch'.
        device_type: 'cuda' or 'cpu'.
        dtype: of weights and activations.
        limits_passed: what the kernels do not take of the model.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    backend, reason = backend_or_torch(
        "kernels.norm_backend",
        requested,
        "csrc",
        "compiled operations found",
        lambda: _norm_error(device_type, dtype, limits_passed),
    )
    logger.info("norms and the embedding's gradient: %s (%s)", backend, reason)
    return backend


def _transformer_engine_error(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return "Transformer Engine is for CUDA devices"
    if dtype != torch.bfloat16:
        return f"Transformer Engine's layers are for bfloat16, not {dtype}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed (pip install 'transformer-engine[pytorch]')"
    return None


def _norm_error(device_type: str, dtype: torch.dtype, limits_passed: Iterable[str]) -> str | None:
    if device_type != "cuda":
        return "the kernels are for Hopper GPUs"
    if (error := hopper_error()) is not None:
        return error
    if dtype != torch.bfloat16:
        return f"the kernels compute in bfloat16, not {dtype}"
    if (error := native_library_error()) is None and not has_operation_for(
        "rms_norm_forward", "CUDA"
    ):
        error = "the compiled operations have no norms (build them again)"
    return error or next((f"the kernels take {limit}" for limit in limits_passed), None)


def _triton_error(
    device_type: str, dtype: torch.dtype, limits_passed: Iterable[str], *, deterministic: bool
) -> str | None:
    if device_type != "cuda":
        return "megatron-core's kernel is for CUDA devices"
    if dtype != torch.bfloat16:
        return f"megatron-core's kernel is for bfloat16, not {dtype}"
    if deterministic:
        # Each start times how many heads a block takes, by which their gradients are summed.
        return "megatron-core's kernel sums over heads in an order that is chosen by timing"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for limit in limits_passed:
        return f"megatron-core's kernel takes {limit}"
    return None
