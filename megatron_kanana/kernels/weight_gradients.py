"""Where our operations put weights' gradients: into megatron-core's fp32 `main_grad`, if any.

megatron-core's data parallelism keeps one fp32 buffer of all gradients, a view of which is each
parameter's `main_grad`, and adds `.grad` to it in a hook. A gradient of all experts is as large as
their weights, so it is added to the buffer by the operation that computes it, and the hook is told
by `grad_added_to_main_grad`, as megatron-core's own linear layers do. Autograd calls the hook of a
parameter whose gradient is None just the same; but with overlapped reductions the hook insists on a
`.grad`, so it gets one that is a single zero in memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def gradient_buffer(parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 tensor to add the parameter's gradient to: `main_grad`, or new zeros."""
    if _has_main_grad(parameter):
        main_grad: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
        return main_grad
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


def gradient_to_return(parameter: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor | None:
    """What the backward of an autograd function returns for the parameter after adding to `buffer`.

    None if the gradient went into `main_grad`, else the buffer in the parameter's dtype.
    """
    if not parameter.requires_grad:
        return None
    if not _has_main_grad(parameter):
        return buffer.to(parameter.dtype)
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if parameter.grad is None:
        parameter.grad = _zero(parameter.dtype, parameter.device).expand(parameter.shape)
    return None


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One for all parameters: nobody writes to it, and making it is a launch."""
    return torch.zeros((), dtype=dtype, device=device)


def collects_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter, for use in operations of torch; its gradient goes where it belongs."""
    result: torch.Tensor = _CollectsGradient.apply(parameter)
    return result


torch.compiler.allow_in_graph(collects_gradient)


class _CollectsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        # Not save_for_backward: what activation recompute gives back has lost `main_grad`.
        ctx.parameter = parameter
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor | None:
        if not _has_main_grad(ctx.parameter):
            return grad
        buffer = gradient_buffer(ctx.parameter)
        buffer.add_(grad)
        return gradient_to_return(ctx.parameter, buffer)


def _has_main_grad(parameter: torch.Tensor) -> bool:
    """Whether gradients are collected in fp32; buffers of another dtype are left to the hook."""
    main_grad = getattr(parameter, "main_grad", None)
    return (
        main_grad is not None
        and main_grad.dtype == torch.float32
        and hasattr(parameter, "grad_added_to_main_grad")
    )
