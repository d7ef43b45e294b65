"""How well the model predicts held-out text, whatever its layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_kanana.data.held_out import HeldOutText
from megatron_kanana.data.mixed import document_segments
from megatron_kanana.kernels.attention import documents_of
from megatron_kanana.model.context_parallel import part_of_batch

from .evaluation import evaluation_mode
from .run import Model

BATCHES_AT_ONCE = 16  # forward passes between two reports of progress


@dataclass(frozen=True)
class HeldOutLoss:
    """What was predicted, and how well.

    Attributes:
        documents, tokens, num_bytes: size of the text.
        predicted: tokens predicted: all but the first of each window.
        nats: sum of their losses.
    """

    documents: int
    tokens: int
    num_bytes: int
    predicted: int
    nats: float

    @property
    def loss(self) -> float:
        """Mean loss, in nats a predicted token."""
        return self.nats / self.predicted if self.predicted else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits to say one byte of text, taking tokens that were not predicted as the others."""
        return self.loss / math.log(2) * self.tokens / self.num_bytes

    def __add__(self, other: HeldOutLoss) -> HeldOutLoss:
        return HeldOutLoss(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
            self.predicted + other.predicted,
            self.nats + other.nats,
        )


def held_out_loss(
    model: Model, text: HeldOutText, on_progress: Callable[[float], None] = lambda _: None
) -> HeldOutLoss:
    """Predict every token of a text but the first of each window; every process must call this.

    Windows are dealt over the data-parallel processes. With `data.document_mask` the documents of
    a window are kept apart, as in training. Nothing of the model changes: no gradients,
    balancing statistics or largest logits.

    Args:
        model: its `schedule.micro_batch_size` windows are predicted in one forward pass.
        text: windows of `data.sequence_length` tokens.
        on_progress: called with the share that is done, from 0 to 1.

    Returns:
        the same on every process.
    """
    batches = list(_batches(model, text))
    end_of_document = model.tokenizer.eod if model.settings.data.document_mask else None
    several = len(model.chunks) > 1
    nats = torch.zeros(1, dtype=torch.float64, device=model.device.torch_device)
    with evaluation_mode(model):
        for start in range(0, len(batches), BATCHES_AT_ONCE * _pipeline_depth()):
            part = batches[start : start + BATCHES_AT_ONCE * _pipeline_depth()]
            iterators = [iter(part) for _ in model.chunks]
            sums = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, end_of_document),
                data_iterator=iterators if several else iterators[0],
                model=model.chunks if several else model.chunks[0],
                num_microbatches=len(part),
                seq_length=part[0][0].shape[1],
                micro_batch_size=model.settings.schedule.micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
            if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
                nats += torch.stack(sums).sum()
            on_progress((start + len(part)) / len(batches))
    dist.all_reduce(nats)
    predicted = int((text.lengths - 1).sum())
    return HeldOutLoss(text.documents, text.tokens, text.num_bytes, predicted, float(nats))


def _pipeline_depth() -> int:
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def _batches(model: Model, text: HeldOutText) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's windows and their lengths, [micro batch, length] and [micro batch].

    All processes have as many, and interleaved stages need a multiple of the pipeline's depth:
    windows of length zero, in which nothing is predicted, fill up. Windows are as long as they can
    be cut in pieces.
    """
    micro_batch = model.settings.schedule.micro_batch_size
    ranks = parallel_state.get_data_parallel_world_size()
    together = ranks * micro_batch * _pipeline_depth()
    count = -(-len(text.windows) // together) * together
    pieces = model.settings.parallel.sequence_pieces
    length = -(-text.windows.shape[1] // pieces) * pieces
    windows = torch.zeros(count, length, dtype=torch.int64)
    windows[: len(text.windows), : text.windows.shape[1]] = torch.from_numpy(text.windows)
    lengths = torch.zeros(count, dtype=torch.int64)
    lengths[: len(text.lengths)] = torch.from_numpy(text.lengths)
    first = parallel_state.get_data_parallel_rank() * micro_batch
    for start in range(first, count, ranks * micro_batch):
        place = slice(start, start + micro_batch)
        device = model.device.torch_device
        yield windows[place].to(device), lengths[place].to(device)


def _forward_step(end_of_document: int | None, iterator: Iterator[Any], chunk: Any) -> Any:
    tokens_BS, lengths_B = next(iterator)
    documents_2BS = None
    if end_of_document is not None:
        documents_2BS = documents_of(document_segments(tokens_BS, end_of_document))
    positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    labels_BS = tokens_BS.roll(-1, dims=1)
    counts_BS = positions_S < (lengths_B - 1)[:, None]
    part = part_of_batch(
        {
            "tokens": tokens_BS,
            "positions": positions_S.expand_as(tokens_BS),
            "labels": labels_BS,
            "counts": counts_BS,
        }
    )
    counts_BS = part["counts"]
    losses_BS = chunk(part["tokens"], part["positions"], documents_2BS, labels=part["labels"])

    def summed(losses_BS: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
        return torch.where(counts_BS, losses_BS.double(), 0.0).sum()

    return losses_BS, summed
