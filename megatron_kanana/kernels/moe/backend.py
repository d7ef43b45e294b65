"""Which implementation of the mixture of experts runs, and why."""

from __future__ import annotations

import logging

import torch

from megatron_kanana.native_library import ExpertLayerSizes

from ..choice import backend_or_torch, fp8_or_not
from ..native import has_operation_for, hopper_error, native_library_error

logger = logging.getLogger(__name__)


def choose_moe_backend(
    requested: str,
    device_type: str,
    *,
    dtype: torch.dtype,
    sizes: ExpertLayerSizes,
) -> str:
    """Pick the backend of routing and experts once, at start-up, and log the reason.

    Args:
        requested: `kernels.moe_backend`: 'auto', 'csrc' or 'torch'.
        device_type: 'cuda' or 'cpu'.
        dtype: what the experts are computed in.
        sizes: of the layer.

    Raises:
        RuntimeError: what was asked for cannot be used here.
    """
    backend, reason = backend_or_torch(
        "kernels.moe_backend",
        requested,
        "csrc",
        "compiled operations found",
        lambda: _csrc_error(device_type, dtype, sizes),
    )
    logger.info("kernels of the experts: %s (%s)", backend, reason)
    return backend


def choose_fp8_experts(
    requested: str, fp8: str, backend: str, device_type: str, sizes: ExpertLayerSizes
) -> bool:
    """Whether the experts are computed in fp8; a CPU leaves it out.

    Args:
        requested: `precision.experts`: 'bf16' or 'fp8'.
        fp8: `precision.fp8`.
        backend: of the experts.
        device_type: 'cuda' or 'cpu'.
        sizes: of the layer.

    Raises:
        RuntimeError: fp8 was asked for and cannot be used here.
    """
    return fp8_or_not(
        "precision.experts",
        "experts",
        requested,
        device_type,
        lambda: _fp8_error(fp8, backend, sizes),
    )


def _fp8_error(fp8: str, backend: str, sizes: ExpertLayerSizes) -> str | None:
    if fp8 != "blockwise":
        return f"the experts' kernels have scales of blocks, not those of precision.fp8 = {fp8}"
    if backend != "csrc":
        return f"kernels.moe_backend is {backend}, and csrc alone has fp8"
    for limit in sizes.hopper_fp8_limits_passed():
        return f"the CUDA kernels take {limit}"
    if not has_operation_for("fp8_experts_forward", "CUDA"):
        return "the compiled operations have no experts in fp8 (build them again)"
    return None


def _csrc_error(device_type: str, dtype: torch.dtype, sizes: ExpertLayerSizes) -> str | None:
    if (error := native_library_error()) is not None:
        return error
    if device_type == "cuda":
        if (error := hopper_error()) is not None:
            return error
        if dtype != torch.bfloat16:
            return f"the CUDA kernels compute in bfloat16, not {dtype}"
        for limit in sizes.hopper_limits_passed():
            return f"the CUDA kernels take {limit}"
    if not has_operation_for("moe_experts_forward", device_type.upper()):
        return f"the compiled operations have no experts for {device_type} (build them again)"
    return None
