"""The largest attention logits, of every head, over all microbatches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import unwrap_model

from megatron_kanana.model.attention import MaxLogitCoreAttention


class AttentionLogits:
    """Takes the maxima that attention modules leave in training forwards.

    Layers of multi-token prediction come after the model's own.
    """

    def __init__(self, chunks: Sequence[Any], config: MLATransformerConfig) -> None:
        self._attentions = [
            module
            for chunk in chunks
            for module in unwrap_model(chunk).modules()
            if isinstance(module, MaxLogitCoreAttention)
        ]
        num_layers = config.num_layers + (config.mtp_num_layers or 0)
        self._shape = (num_layers, config.num_attention_heads)
        self._device = next(chunks[0].parameters()).device
        self._by_layer = torch.full((num_layers,), float("-inf"))

    def reduce(self) -> torch.Tensor:
        """Each head's maximum since the last call, on the CPU: fp32 [layers, heads].

        One collective for all layers; every process must call this. -inf where there was no
        training forward.
        """
        maxima = torch.full(self._shape, float("-inf"), device=self._device)
        for attention in self._attentions:
            if (heads := attention.take_max_logits()) is not None:
                # Local heads are dealt out over context parallelism.
                place = (
                    parallel_state.get_tensor_model_parallel_rank()
                    * parallel_state.get_context_parallel_world_size()
                    + parallel_state.get_context_parallel_rank()
                )
                first = place * len(heads)
                maxima[attention.layer_number - 1, first : first + len(heads)] = heads
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        result = maxima.cpu()
        self._by_layer = torch.maximum(self._by_layer, result.amax(1))
        return result

    def forget(self) -> None:
        """Drop what forwards have left since the last reduction."""
        for attention in self._attentions:
            attention.take_max_logits()

    def take(self) -> list[float]:
        """Each layer's maximum over what was reduced since the last call."""
        by_layer = self._by_layer.tolist()
        self._by_layer.fill_(float("-inf"))
        return by_layer
