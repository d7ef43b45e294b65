"""A GPTModel whose losses are computed without the logits of all tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_kanana.kernels.linear_cross_entropy import linear_cross_entropy


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which hands hidden states over instead of logits for a while.

    Attributes:
        hands_over: whether it does.
    """

    hands_over = False

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        """As ColumnParallelLinear's, or the input as it is."""
        if self.hands_over:
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)

    @contextlib.contextmanager
    def handing_over(self) -> Iterator[None]:
        """Meanwhile what it gives are hidden states."""
        self.hands_over = True
        try:
            yield
        finally:
            self.hands_over = False


class LinearLossGPTModel(GPTModel):
    """A GPTModel that takes losses from hidden states, where labels are given.

    Without labels it gives logits, as before.
    """

    def __init__(
        self, *args: Any, loss_backend: str, loss_fp8: bool = False, **options: Any
    ) -> None:
        """As GPTModel's.

        Args:
            args, options: GPTModel's.
            loss_backend: one of `kernels.linear_cross_entropy`.
            loss_fp8: whether the output layer's products are in fp8 where gradients are wanted.
        """
        super().__init__(*args, **options)
        self._loss_backend = loss_backend
        self._loss_fp8 = loss_fp8
        self._gradient_weights: list[torch.Tensor | None] = []
        if self.post_process:
            # GPTModel builds the layer; another one would have the vocabulary's weights twice.
            self.output_layer.__class__ = OutputLayer

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        gradient_weights: Sequence[torch.Tensor | None] | None = None,
        **options: Any,
    ) -> Any:
        """As GPTModel's.

        Args:
            input_ids, position_ids, labels: [batch, sequence].
            attention_mask: as core attention takes it.
            loss_mask: [batch, sequence]. Where nothing else is said, the gradient of the losses
                must be a multiple of it; None if it may be anything, which can cost one product
                of the output layer more.
            gradient_weights: what the gradients of the losses are multiples of, [batch, sequence]
                of each loss in the order in which GPTModel takes them.
        """
        inputs = (input_ids, position_ids, attention_mask)
        options = {**options, "labels": labels, "loss_mask": loss_mask}
        if labels is None or not self.post_process:
            return super().forward(*inputs, **options)
        self._gradient_weights = [*(gradient_weights or [loss_mask])]
        with self.output_layer.handing_over():
            return super().forward(*inputs, **options)

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Losses fp32 [batch, sequence].

        Args:
            labels: [batch, sequence].
            logits: what the output layer handed over: hidden states [sequence or this process's
                part of it, batch, hidden size].
        """
        weights_BS = self._gradient_weights.pop(0)
        layer = self.output_layer
        losses_T = linear_cross_entropy(
            logits.flatten(0, 1),
            layer.weight,
            labels.t().flatten(),
            None if weights_BS is None else weights_BS.t().flatten().float(),
            backend=self._loss_backend,
            tp_group=layer.tp_group if layer.tp_group.size() > 1 else None,
            sequence_parallel=layer.sequence_parallel,
            fp8=self._loss_fp8,
        )
        losses_BS: torch.Tensor = losses_T.view(labels.t().shape).t().contiguous()
        return losses_BS
