"""Tokens to their experts by DeepEP's kernels (https://github.com/deepseek-ai/DeepEP)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.fused_a2a import fused_combine, fused_dispatch

from megatron_kanana.kernels.moe import Permutation

from .dispatcher import LocalDispatcher


class DeepEPDispatcher(LocalDispatcher):
    """Sends each token once to each process that holds some of its experts, as AllToAllDispatcher.

    DeepEP's dispatch waits on the host for the number of tokens that come; its combine adds a
    token's outputs in fp32. It is for CUDA and bf16, and for experts that are not split.
    """

    _handle: Any = None
    _num_rows = 0

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send tokens and weights where their experts are; those that came here."""
        assert self._experts is not None
        hidden_states, experts, probs, tokens_per_expert, self._handle = fused_dispatch(
            hidden_states,
            self._experts.long(),
            probs,
            self.config.num_moe_experts,
            self.ep_group,
        )
        self._experts = experts.int()
        self._num_rows = int(tokens_per_expert.sum())  # of numbers on the host
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Permutation, torch.Tensor]:
        """What the experts take: tokens, the order of their slots by expert, and weights."""
        return hidden_states, self._permutation(self._num_rows), probs

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send the outputs back, and add up those of each token."""
        handle, self._handle = self._handle, None
        combined: torch.Tensor = fused_combine(hidden_states, self.ep_group, handle)[0]
        return combined
