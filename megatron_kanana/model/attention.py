"""The core attention of MLA: query-key and value widths differ, and the largest logits are kept."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.kernels.attention import attention

from .context_parallel import part_of_sequence, whole_sequence


def core_attention_spec(backend: str, deterministic: bool) -> ModuleSpec:
    """The core attention of every layer; see `MaxLogitCoreAttention`."""
    params = {"backend": backend, "deterministic": deterministic}
    return ModuleSpec(module=MaxLogitCoreAttention, params=params)


class MaxLogitCoreAttention(MegatronModule):
    """Causal attention that leaves each head's largest logit beside the module.

    Under context parallelism it gets all local heads of a part of the sequence, and computes a part
    of the heads over the whole of it.

    Attributes:
        max_logits: fp32 [heads computed here], the running maximum over the training forwards since
            it was last taken, raised in place; None before the first. Evaluation does not touch it.

    Args:
        backend: implementation of the attention (see `kernels.attention`).
        deterministic: whether its gradients have the same bits run to run.
        The others are those megatron-core's MLA passes to its core attention.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        layer_number: int,
        *,
        backend: str,
        deterministic: bool,
        softmax_scale: float,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.backend = backend
        self.deterministic = deterministic
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp
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

        Keys and values may be more than the queries, which then are the last positions. Under
        context parallelism `sequence` is this process's part, and the mask is of all tokens.

        Args:
            attention_mask: int32 [2, batch, sequence], where each token's document begins and
                ends, as `kernels.attention` takes it. megatron-core hands this argument on as it
                is, so it need not be a mask of sequence by sequence.
        """
        is_split = self.config.context_parallel_size > 1
        if is_split:
            query, key, value = (whole_sequence(x, self.cp_group) for x in (query, key, value))
        if self.training and self.max_logits is None:
            self.max_logits = torch.full(
                (query.shape[2],), float("-inf"), dtype=torch.float32, device=query.device
            )
        out = attention(
            query,
            key,
            value,
            self.softmax_scale,
            backend=self.backend,
            documents_2BS=attention_mask,
            max_logits_N=self.max_logits if self.training else None,
            deterministic=self.deterministic,
        )
        if is_split:
            out = part_of_sequence(out, self.cp_group)
        return out.flatten(2)

    def take_max_logits(self) -> torch.Tensor | None:
        """The running maximum; the next forward starts a new one."""
        max_logits, self.max_logits = self.max_logits, None
        return max_logits
