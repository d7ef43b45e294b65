"""The loss that balances the experts' loads within each sequence, without autograd's copies."""

from __future__ import annotations

from typing import Any

import torch


def balance_loss(
    logits_TX: torch.Tensor,
    counts_BX: torch.Tensor,
    factor: torch.Tensor | float,
    padding_T: torch.Tensor | None,
) -> torch.Tensor:
    """factor * sum over sequences b and experts x of counts[b, x] * P[b, x], fp32 [].

    P[b, x] is the sum over the tokens of b of sigmoid(logit) / (sum over experts of the same): with
    the factor X / (K T^2), for T tokens a sequence, DeepSeek-V3 (arXiv 2412.19437), equations 17 to
    20. Nothing of the size of the logits is kept but the logits.

    Args:
        logits_TX: fp32 [tokens, experts]; the tokens are those of the first places of all
            sequences, then those of the second ones, and so on.
        counts_BX: fp32 [sequences, experts], tokens that choose each expert.
        factor: fp32 [] or a number.
        padding_T: bool [tokens]; tokens that are True do not count.
    """
    loss: torch.Tensor = _BalanceLoss.apply(logits_TX, counts_BX, factor, padding_T)
    return loss


class _BalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TX: torch.Tensor,
        counts_BX: torch.Tensor,
        factor: torch.Tensor | float,
        padding_T: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(logits_TX, counts_BX * factor, padding_T)
        shares_TX, _ = _shares(logits_TX, padding_T)
        of_sequences_BX = shares_TX.view(-1, *counts_BX.shape).sum(0)
        return (of_sequences_BX * counts_BX).sum() * factor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TX, weighted_counts_BX, padding_T = ctx.saved_tensors
        shares_TX, total_T1 = _shares(logits_TX, padding_T)
        by_place = shares_TX.view(-1, *weighted_counts_BX.shape)
        gain_BX = grad * weighted_counts_BX
        mean_loss = (by_place * gain_BX).sum(-1, keepdim=True)
        # d share / d score is (1 - share) / total, and d score / d logit is score * (1 - score).
        slope = by_place * (1 - by_place * total_T1.view(*by_place.shape[:2], 1))
        return ((gain_BX - mean_loss) * slope).view_as(logits_TX), None, None, None


def _shares(
    logits_TX: torch.Tensor, padding_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's share of a token's scores, zero for padding; and the sum of the scores."""
    scores_TX = logits_TX.sigmoid()
    total_T1 = scores_TX.sum(1, keepdim=True) + 1e-20
    shares_TX = scores_TX / total_T1
    if padding_T is not None:
        shares_TX = shares_TX * (~padding_T)[:, None]
    return shares_TX, total_T1
