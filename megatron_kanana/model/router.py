"""The router of the experts, which leaves padding out of balance and losses in every layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


def reset_expert_bias(chunks: Iterable[torch.nn.Module]) -> None:
    """Set the biases that balance the experts' loads to zero, in all routers of the chunks."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.expert_bias.zero_()


class PaddingAwareRouter(TopKRouter):
    """megatron-core's router; padding, where there is any, counts in no load and in no loss.

    megatron-core's own leaves padding out of the balance loss alone: it fails to count the tokens
    of each expert with a mask, and under sequence parallelism it averages the z-loss over each
    process's tokens, however many of them are padding. Padding is still sent to experts.
    """

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The z-loss (arXiv 2202.08906, equation 5), a mean over the tokens of all processes.

        Args:
            logits: [tokens, experts].
            padding_mask: bool [tokens], true where there is padding.
        """
        coefficient = self.config.moe_z_loss_coeff
        if padding_mask is None or not coefficient:
            unmasked: torch.Tensor = super().apply_z_loss(logits, padding_mask)
            return unmasked
        if not self.training or not torch.is_grad_enabled():
            return logits
        counts = (~padding_mask).to(logits.dtype)
        total = counts.sum()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
        squares = logits.logsumexp(-1).square()
        loss = (squares * counts).sum() / total.clamp(min=1.0)
        result: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, coefficient * loss)
        return result

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        """Count the tokens of each expert, from which its bias is updated."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)
