"""The three products of an output layer, and what lies between them, a chunk of tokens at a time.

Shape suffixes: those of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from .vocabulary import Vocabulary

ALIGNED_WORDS = 8
"""Rows of logits begin at multiples of it: 16 bytes in bf16, which kernels load at once."""


@dataclass(frozen=True)
class HeadGradients:
    """What gradients of a chunk are written to.

    Attributes:
        hidden_states_TD: of all tokens, in their dtype; None where it is not wanted.
        weight_VD: fp32 sums; None where they are not wanted.
    """

    hidden_states_TD: torch.Tensor | None
    weight_VD: torch.Tensor | None


@dataclass(frozen=True)
class ChunkLosses:
    """Losses of a chunk of tokens, whose gradients are wanted.

    Attributes:
        tokens: which of all.
        labels_C: int64, over the whole vocabulary.
        weights_C: gradient of each loss, fp32.
        logits_CV: where they are known; they may be overwritten.
        statistics_3C: where they are known, of the whole vocabulary.
    """

    tokens: slice
    labels_C: torch.Tensor
    weights_C: torch.Tensor
    logits_CV: torch.Tensor | None = None
    statistics_3C: torch.Tensor | None = None


class Products(Protocol):
    """An output layer's products with the hidden states of all tokens.

    Attributes:
        token_multiple: of which the tokens of a chunk are multiples, but for the last one.
    """

    token_multiple: ClassVar[int]

    def __init__(
        self, vocabulary: Vocabulary, hidden_states_TD: torch.Tensor, weight_VD: torch.Tensor
    ) -> None: ...

    @property
    def bytes_per_token(self) -> int:
        """Of a chunk's logits and what is made of them."""

    def logits(self, chunk: slice) -> torch.Tensor:
        """Of a chunk, [C, V]."""

    def add_gradients(
        self, losses: ChunkLosses, to: HeadGradients, *, to_what_is_there: bool = True
    ) -> torch.Tensor:
        """Gradients of a chunk's weighted losses.

        Args:
            losses: of the chunk.
            to: where they go; of the hidden states those of the chunk are set.
            to_what_is_there: whether the weight's is added to; else it may hold anything before.

        Returns:
            The chunk's statistics, of the whole vocabulary.
        """


class OwnFormatProducts:
    """`Products` in the dtype of hidden states and weight, by torch."""

    token_multiple: ClassVar[int] = 1

    def __init__(
        self, vocabulary: Vocabulary, hidden_states_TD: torch.Tensor, weight_VD: torch.Tensor
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden_states_TD = hidden_states_TD
        self._weight_VD = weight_VD

    @property
    def bytes_per_token(self) -> int:
        """The gradient takes the logits' place."""
        return self._weight_VD.shape[0] * self._weight_VD.itemsize

    def logits(self, chunk: slice) -> torch.Tensor:
        """As `Products.logits`, each row beginning at a multiple of `ALIGNED_WORDS`."""
        hidden_states_CD = self._hidden_states_TD[chunk]
        words = self._weight_VD.shape[0]
        padded = -(-words // ALIGNED_WORDS) * ALIGNED_WORDS
        padded_CV = hidden_states_CD.new_empty(hidden_states_CD.shape[0], padded)
        # oneDNN's bf16 products with AMX read behind a row's end and multiply that by zero, which
        # gives NaN where memory holds one (uxlfoundation/oneDNN, issue 5717).
        padded_CV[:, words:].zero_()
        return torch.mm(hidden_states_CD, self._weight_VD.t(), out=padded_CV[:, :words])

    def add_gradients(
        self, losses: ChunkLosses, to: HeadGradients, *, to_what_is_there: bool = True
    ) -> torch.Tensor:
        """As `Products.add_gradients`."""
        vocabulary, weight_VD = self._vocabulary, self._weight_VD
        logits_CV, statistics_3C = losses.logits_CV, losses.statistics_3C
        if logits_CV is None:
            logits_CV = self.logits(losses.tokens)
        if statistics_3C is None:
            statistics_3C = vocabulary.statistics(logits_CV, weight_VD, losses.labels_C)
        vocabulary.rows.gradient_(
            logits_CV,
            losses.labels_C,
            vocabulary.first_word(weight_VD),
            statistics_3C.contiguous(),
            losses.weights_C,
        )
        if to.hidden_states_TD is not None:
            torch.mm(logits_CV, weight_VD, out=to.hidden_states_TD[losses.tokens])
        if to.weight_VD is not None:
            hidden_states_CD = self._hidden_states_TD[losses.tokens]
            _add_product_(to.weight_VD, logits_CV, hidden_states_CD, to_what_is_there)
        return statistics_3C


def _add_product_(
    sums_VD: torch.Tensor, left_CV: torch.Tensor, right_CD: torch.Tensor, to_what_is_there: bool
) -> None:
    """sums = left^T right, or sums += left^T right, summed in fp32."""
    beta = 1 if to_what_is_there else 0
    left_VC = left_CV.t()
    if right_CD.dtype == torch.float32:
        torch.addmm(sums_VD, left_VC, right_CD, beta=beta, out=sums_VD)
    elif right_CD.is_cuda:
        torch.addmm(sums_VD, left_VC, right_CD, torch.float32, beta=beta, out=sums_VD)
    else:
        torch.addmm(sums_VD, left_VC.float(), right_CD.float(), beta=beta, out=sums_VD)
