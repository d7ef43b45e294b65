"""Samples of packed conversations, numbered over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .conversation_store import ConversationStore
from .packing import pack


class PackedConversations(torch.utils.data.Dataset[dict[str, Any]]):
    """Training samples: pass after pass over the packed conversations, each in another order.

    Which sample has a number follows from number and seed alone, so a resumed run needs nothing
    but the number of samples that were used.

    Attributes:
        samples_per_pass: how many samples the conversations fill.
        filled: share of the samples' tokens that is no padding.

    Args:
        store: the conversations.
        chosen: numbers of those to use.
        sequence_length: tokens of a sample.
        seed: of packing and order.
        padding: token that fills up samples.
        total: samples of the run.
    """

    has_segment_ids = True

    def __init__(
        self,
        store: ConversationStore,
        chosen: Sequence[int],
        sequence_length: int,
        seed: int,
        padding: int,
        total: int,
    ) -> None:
        self._store, self._chosen = store, np.asarray(chosen, dtype=np.int64)
        self._sequence_length, self._seed, self._padding = sequence_length, seed, padding
        self._total = total
        lengths = store.lengths()[self._chosen]
        self._items, self._begins = pack(lengths, sequence_length, seed)
        self.samples_per_pass = len(self._begins) - 1
        self.filled = float(lengths.sum()) / (self.samples_per_pass * sequence_length)
        self._pass = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """tokens, labels, loss_mask, position_ids and segment_ids, [sequence] each."""
        number, within = divmod(sample, self.samples_per_pass)
        if number != self._pass:
            generator = np.random.default_rng([self._seed, number])
            self._pass, self._order = number, generator.permutation(self.samples_per_pass)
        return self._packed(int(self._order[within]))

    def _packed(self, index: int) -> dict[str, Any]:
        items = self._items[self._begins[index] : self._begins[index + 1]]
        conversations = [self._store[int(self._chosen[item])] for item in items]
        return packed_sample(conversations, self._sequence_length, self._padding)


class HeldOutConversations(PackedConversations):
    """Samples of one evaluation: each packed sample once, and empty ones behind the last."""

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """As training samples; in an empty one all is padding."""
        if sample < self.samples_per_pass:
            return self._packed(sample)
        return packed_sample([], self._sequence_length, self._padding)


def packed_sample(
    conversations: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]],
    sequence_length: int,
    padding: int,
) -> dict[str, torch.Tensor]:
    """One sample.

    Args:
        conversations: tokens of each, and which of them are learnt; the predictions, one less than
            the tokens of each, fit into the sample.
        sequence_length: tokens of the sample.
        padding: token that fills it up.

    Returns:
        tokens, labels, position_ids int64, loss_mask fp32 and segment_ids int32, [sequence] each.
        Positions begin at 0 with each conversation.
    """
    tokens = np.full(sequence_length, padding, dtype=np.int64)
    labels, mask = tokens.copy(), np.zeros(sequence_length, dtype=np.float32)
    positions = np.zeros(sequence_length, dtype=np.int64)
    segments = np.full(sequence_length, -1, dtype=np.int32)
    start = 0
    for number, (ids, trained) in enumerate(conversations):
        place = slice(start, start + len(ids) - 1)
        tokens[place], labels[place], mask[place] = ids[:-1], ids[1:], trained[1:]
        positions[place], segments[place] = np.arange(len(ids) - 1), number
        start = place.stop
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        "segment_ids": torch.from_numpy(segments),
    }
