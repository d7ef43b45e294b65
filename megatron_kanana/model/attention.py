"""The core attention of MLA: query-key and value widths differ, and the largest logits are kept."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.kernels.attention import causal_attention


class MaxLogitCoreAttention(MegatronModule):
    """Causal attention that leaves each head's largest logit beside the module.

    Attributes:
        max_logits: fp32 [local heads], the running maximum over the training forwards since it
            was last taken; None before the first. Evaluation does not touch it.

    Args:
        backend: implementation of the attention (see `kernels.attention`).
        The others are those megatron-core's MLA passes to its core attention.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        layer_number: int,
        *,
        backend: str,
        softmax_scale: float,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.backend = backend
        self.softmax_scale = softmax_scale
        self.max_logits: torch.Tensor | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[sequence, batch, heads, width] each -> [sequence, batch, heads * value width].

        Keys and values may be more than the queries, which then are the last positions.

        Args:
            attention_mask: int [batch, sequence], the document of each token as `causal_attention`
                takes it. megatron-core hands this argument on as it is, so it need not be a mask
                of sequence by sequence.
        """
        out, max_logits = causal_attention(
            query,
            key,
            value,
            self.softmax_scale,
            backend=self.backend,
            with_max_logits=self.training,
            segment_ids_BS=attention_mask,
        )
        if max_logits is not None:
            previous = self.max_logits
            self.max_logits = (
                max_logits if previous is None else torch.maximum(previous, max_logits)
            )
        return out.flatten(2)

    def take_max_logits(self) -> torch.Tensor | None:
        """The running maximum; the next forward starts a new one."""
        max_logits, self.max_logits = self.max_logits, None
        return max_logits
