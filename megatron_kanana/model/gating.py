"""The product that scores tokens for the experts: fp32 logits, of bf16 operands on CUDA."""

from __future__ import annotations

from typing import Any

import torch


def gating_logits(hidden_states_TD: torch.Tensor, weight_XD: torch.Tensor) -> torch.Tensor:
    """Logits of the router, fp32 [tokens, experts], differentiable.

    In bf16 on CUDA the operands stay bf16: their products are exact in fp32, in which they are
    added. Backward, the fp32 gradient is the sum of two bf16 numbers, which keep 16 of its 24 bits
    (relative error at most 2^-17); the gradients are then rounded to bf16, which has 8. Elsewhere
    everything is computed in fp32.

    Args:
        hidden_states_TD: [tokens, hidden size].
        weight_XD: [experts, hidden size], of the same dtype.
    """
    logits_TX: torch.Tensor = _GatingLogits.apply(hidden_states_TD, weight_XD)
    return logits_TX


class _GatingLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states_TD: torch.Tensor, weight_XD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states_TD, weight_XD)
        if _stays_in_bf16(hidden_states_TD):
            return torch.mm(hidden_states_TD, weight_XD.T, out_dtype=torch.float32)
        return torch.mm(hidden_states_TD.float(), weight_XD.float().T)

    @staticmethod
    def backward(ctx: Any, grad_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states_TD, weight_XD = ctx.saved_tensors
        if not _stays_in_bf16(hidden_states_TD):
            grad_hidden_states_TD = torch.mm(grad_TX, weight_XD.float())
            grad_weight_XD = torch.mm(grad_TX.T, hidden_states_TD.float())
        else:
            parts = torch.cat(split_in_bf16(grad_TX), 1)
            grad_hidden_states_TD = torch.mm(parts, torch.cat([weight_XD, weight_XD]))
            grad_weight_XD = (
                torch.mm(parts.T, hidden_states_TD, out_dtype=torch.float32)
                .unflatten(0, (2, -1))
                .sum(0)
            )
        return (
            grad_hidden_states_TD.to(hidden_states_TD.dtype),
            grad_weight_XD.to(weight_XD.dtype),
        )


def split_in_bf16(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bf16 tensors whose sum is close to an fp32 one: its rounded value, and the rest."""
    high = numbers.bfloat16()
    return high, (numbers - high).bfloat16()


def _stays_in_bf16(hidden_states_TD: torch.Tensor) -> bool:
    return hidden_states_TD.is_cuda and hidden_states_TD.dtype == torch.bfloat16
