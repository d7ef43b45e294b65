"""The router of the experts, on `kernels.moe`; padding counts in no load and in no loss."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kanana.kernels.moe import count_tokens, route

from .balance_loss import balance_loss
from .gating import gating_logits


def reset_expert_bias(chunks: Iterable[torch.nn.Module]) -> None:
    """Set the biases that balance the experts' loads to zero, in all routers of the chunks."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.expert_bias.zero_()


class Router(TopKRouter):
    """megatron-core's router with sigmoid scores, whose result is a list of experts a token.

    megatron-core's own makes a map of all tokens and experts. It leaves padding out of the balance
    loss alone: it fails to count the tokens of each expert with a mask, and under sequence
    parallelism it averages the z-loss over each process's tokens, however many of them are padding.
    Padding is still sent to experts.

    Attributes:
        local_tokens_per_expert: fp32 [experts], tokens of this process since megatron-core took
            them with the last step's gradients; counted in forwards that autograd follows, once
            with activation recompute.

    Args:
        config: megatron-core's.
        pg_collection: megatron-core's process groups.
        backend: implementation (see `kernels.moe`).
        options: megatron-core's others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        backend: str,
        **options: Any,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **options)
        self.backend = backend

    def _maintain_float32_expert_bias(self) -> None:
        """Bias and counts in fp32, also after the module was cast to bf16."""
        super()._maintain_float32_expert_bias()
        if self.local_tokens_per_expert.dtype != torch.float32:
            self.local_tokens_per_expert.data = self.local_tokens_per_expert.data.float()

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """[sequence, batch, hidden size] -> logits, fp32 [sequence, batch, experts]."""
        logits_TX = gating_logits(input.flatten(0, -2), self.weight)
        return logits_TX.view(*input.shape[:-1], -1)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, and the losses of the choice.

        Args:
            logits: fp32 [sequence, batch, experts].
            padding_mask: bool [sequence, batch], true where there is padding.

        Returns:
            weights fp32 [T, K], through which the losses get their gradients; and experts int32
            [T, K].
        """
        batch_size = logits.shape[1]
        logits_TX = logits.flatten(0, 1)
        padding_T = None if padding_mask is None else padding_mask.flatten()
        logits_TX = self.apply_z_loss(logits_TX, padding_T)
        config = self.config
        weights_TK, experts_TK = route(
            logits_TX,
            self.expert_bias,
            num_experts_per_token=self.topk,
            num_groups=config.moe_router_num_groups or 1,
            groups_per_token=config.moe_router_group_topk or 1,
            scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
            backend=self.backend,
        )
        if torch.is_grad_enabled():
            if self.training and self.is_aux_loss_enabled():
                weights_TK = self._with_balance_loss(weights_TK, logits_TX, batch_size, padding_T)
            counts_X = self.local_tokens_per_expert
            count_tokens(experts_TK, counts_X, padding_T, backend=self.backend)
        return weights_TK, experts_TK

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

    def _with_balance_loss(
        self,
        weights_TK: torch.Tensor,
        logits_TX: torch.Tensor,
        batch_size: int,
        padding_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """The balance loss within sequences, which looks at scores without bias and groups."""
        _, choice_TK = route(
            logits_TX.detach(),
            None,
            num_experts_per_token=self.topk,
            backend=self.backend,
        )
        choice_TK = choice_TK + _first_experts_of_sequences(
            len(choice_TK), batch_size, self.num_experts, choice_TK.device
        )
        counts = logits_TX.new_zeros(batch_size * self.num_experts)
        count_tokens(choice_TK, counts, padding_T, backend=self.backend)
        num_tokens: torch.Tensor | int = len(choice_TK) // batch_size
        total: torch.Tensor | int = num_tokens * self.tp_cp_group.size()
        if padding_T is not None:  # its mean over the sequences, which share the microbatch's loss
            num_tokens = counts.sum() / (self.topk * batch_size)
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        if padding_T is not None:
            total = counts.sum() / (self.topk * batch_size)
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        factor = coefficient * self.num_experts / (self.topk * batch_size * total * total)
        loss = balance_loss(logits_TX, counts.view(batch_size, -1), factor, padding_T)
        result: torch.Tensor = self.attach_and_log_load_balancing_loss(
            weights_TK,
            coefficient,
            loss,
            "seq_load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=num_tokens,
        )
        return result


@functools.lru_cache(maxsize=8)
def _first_experts_of_sequences(
    tokens: int, batch_size: int, num_experts: int, device: torch.device
) -> torch.Tensor:
    """What numbers experts apart for each sequence, int32 [tokens, 1]; the same in every layer."""
    sequence_T = torch.arange(tokens, device=device, dtype=torch.int32) % batch_size
    return (num_experts * sequence_T)[:, None]
