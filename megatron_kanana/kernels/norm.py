"""RMSNorm by the operations of csrc/, for Hopper GPUs; elsewhere torch's own is used."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .native import load_native_operations
from .weight_gradients import gradient_buffer, gradient_to_return

_operations = torch.ops.megatron_kanana
_ALIGNED_ELEMENTS = 8  # bf16 numbers in 16 bytes


def rms_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float, *, zero_centered: bool
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * gain over the last dimension (arXiv 1910.07467).

    The gain's gradient is added to `weight.main_grad`, if there is one (see `weight_gradients`).
    Everything is computed in fp32, and has the same bits run to run.

    Args:
        hidden_states: bf16 [..., width] on a Hopper GPU; rows may lie apart.
        weight: bf16 [width], the gain.
        epsilon: added to the mean square.
        zero_centered: the gain is `weight` + 1.

    Returns:
        bf16, of hidden_states' shape.

    Raises:
        RuntimeError: the width is no multiple of 8 or above 16384, or dtypes are others.
    """
    result: torch.Tensor = _RMSNorm.apply(hidden_states, weight, epsilon, zero_centered)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        zero_centered: bool,
    ) -> torch.Tensor:
        _load()
        rows = _rows(hidden_states)
        out, reciprocal = _operations.rms_norm_forward(rows, weight, epsilon, zero_centered)
        ctx.save_for_backward(rows, reciprocal)
        # Not save_for_backward: what activation recompute gives back has lost `main_grad`.
        ctx.weight, ctx.zero_centered = weight, zero_centered
        result: torch.Tensor = out.view(hidden_states.shape)
        return result

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        rows, reciprocal = ctx.saved_tensors
        buffer = gradient_buffer(ctx.weight)
        grad = _operations.rms_norm_backward(
            grad_out.reshape(rows.shape).contiguous(),
            rows,
            reciprocal,
            ctx.weight.detach(),
            ctx.zero_centered,
            buffer,
        )
        return grad.view(grad_out.shape), gradient_to_return(ctx.weight, buffer), None, None


def _rows(hidden_states: torch.Tensor) -> torch.Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    aligned = rows.stride(0) % _ALIGNED_ELEMENTS == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned and rows.stride(1) == 1 else rows.contiguous()


@functools.cache
def _load() -> None:
    load_native_operations("kernels.norm_backend")
