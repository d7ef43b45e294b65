"""Multi-token prediction (DeepSeek-V3, section 2.2): losses of training steps, and of those only.

megatron-core's GPTModel adds the layers' losses to the gradient behind the scenes. Here it does so
in training alone, and the losses are handed over to be reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper, roll_tensor
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from .context_parallel import positions, sum_over_group
from .linear_loss import LinearLossGPTModel
from .segments import mask_within_documents


class MultiTokenGPTModel(LinearLossGPTModel):
    """A GPTModel whose multi-token prediction layers run in training forwards with labels only.

    Layer k predicts the token k places after the next one, from the hidden states of layer k - 1
    (the model's own, after its final norm, for k = 1) and the embedding of the token k places on:
    equations 21 to 25. Each layer's loss is the mean over its labels that count. Nothing is
    predicted from one document into the next.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As GPTModel's.

        A microbatch without any label for the last layer teaches the layers nothing; the losses
        reported for it are means over all its tokens.

        Args:
            input_ids, position_ids, labels: [batch, sequence].
            attention_mask: where each token's document begins and ends, int32 [2, batch, sequence],
                or None for one document. With several layers, a document's first tokens are no
                labels, as many as there are layers.
            loss_mask: [batch, sequence], one where a label counts.
            loss_weight: weight of a token's loss, of no dimension; the losses are then weighted
                sums instead of means.
        """
        inputs = (input_ids, position_ids, attention_mask)
        if not self.mtp_process:
            return super().forward(*inputs, labels=labels, **options)
        if labels is None or not self.training:
            with _set(self, mtp_process=False), _set(self.config, mtp_num_layers=None):
                return super().forward(*inputs, labels=labels, **options)
        own_loss_mask = loss_mask
        if loss_mask is None:
            loss_mask = torch.ones_like(labels)
        # In fp32, in which the labels are counted. megatron-core divides by that count: where it
        # is zero, all labels are taken and weighed with zero.
        loss_mask = loss_mask.float()
        if attention_mask is not None:
            loss_mask = mask_within_documents(loss_mask, attention_mask, self.config.mtp_num_layers)
        ranks, ahead = self.config.context_parallel_size, self.config.mtp_num_layers
        begins_S = positions(loss_mask.shape[1], loss_mask.device) >= ahead
        count = sum_over_group((loss_mask * begins_S).sum())  # of the last layer's labels
        any_label = count > 0
        loss_mask = torch.where(any_label, loss_mask, 1.0)
        scale = self.config.mtp_loss_scaling_factor * any_label
        if ranks > 1:  # each process has a part of the mean, of one layer
            everywhere = len(loss_mask) * (ranks * loss_mask.shape[1] - ahead)
            count = torch.where(any_label, count, everywhere)
            loss_weight = 1.0 / count if loss_weight is None else loss_weight
        if loss_weight is not None:
            scale = scale * loss_weight * ranks  # data parallelism averages over the parts
        with _set(
            self.config,
            mtp_loss_scaling_factor=scale,
            # Has GPTModel take sums; schedules and routers have read it before, or read it later.
            calculate_per_token_loss=loss_weight is not None,
        ):
            options |= {"labels": labels, "loss_mask": loss_mask}
            masks = [*self._masks_of_layers(loss_mask)]
            weights = [*masks, own_loss_mask]
            with _part_of_mean(masks[-1], count) if ranks > 1 else contextlib.nullcontext():
                return super().forward(*inputs, gradient_weights=weights, **options)

    def _masks_of_layers(self, loss_mask: torch.Tensor) -> Iterator[torch.Tensor]:
        """Where each layer's labels count, as GPTModel takes them from `loss_mask`."""
        for _ in range(self.config.mtp_num_layers):
            loss_mask, _ = roll_tensor(loss_mask, shifts=-1, dims=-1, cp_group=self.cp_group)
            yield loss_mask

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """As GPTModel's, which looks for a process group in `metadata` even without metadata."""
        return super().sharded_state_dict(
            prefix, sharded_offsets, ensure_metadata_has_dp_cp_group(metadata)
        )


@contextlib.contextmanager
def _part_of_mean(loss_mask: torch.Tensor, count: torch.Tensor) -> Iterator[None]:
    """Make of the loss that is kept meanwhile, a mean of this process, its part of all's mean.

    Args:
        loss_mask: where labels of this process count.
        count: labels of all processes that do.
    """
    tracker = MTPLossLoggingHelper.tracker
    before = tracker["values"].clone() if "values" in tracker else 0.0
    yield
    own_count = loss_mask.sum()
    of_process = torch.where(own_count > 0, tracker["values"] - before, 0.0)
    tracker["values"] = before + of_process * own_count / count


def take_mtp_losses(num_microbatches: int) -> torch.Tensor | None:
    """Mean losses of the training forwards since the last call, fp32 [num_mtp_layers].

    Args:
        num_microbatches: how many forwards there were.

    Returns:
        None on a process without multi-token prediction layers.
    """
    losses: torch.Tensor | None = MTPLossLoggingHelper.tracker.pop("values", None)
    return None if losses is None else losses / num_microbatches


@contextlib.contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    """Give attributes other values for a while."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
