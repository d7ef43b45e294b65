"""Held-out text as windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_kanana.config.dataset_files import sequence_count

from .documents import read_documents
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutText:
    """One file or dataset, cut into windows.

    Attributes:
        documents: how many there are.
        num_bytes: of the documents' UTF-8 text.
        windows: int64 [windows, length]; what follows the last token of all is zero.
        lengths: int64 [windows], tokens of each window that are text.
    """

    documents: int
    num_bytes: int
    windows: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens of all documents, with the end-of-document tokens."""
        return int(self.lengths.sum())


def read_held_out(
    path: Path, tokenizer: Tokenizer, length: int, text_key: str = "text"
) -> HeldOutText:
    """Read documents and put them end to end, each with its end-of-document token.

    Args:
        path: .jsonl, .txt or .parquet file, or an indexed dataset without its suffix, whose
            documents must have been made with the same tokenizer.
        tokenizer: of the model.
        length: tokens of a window.
        text_key: field or column that holds the text.

    Raises:
        ValueError: the file cannot be read, or has no document or a single token.
    """
    if path.is_file():
        encoded = _encoded(read_documents(path, text_key), tokenizer)
    else:
        if not Path(f"{path}.idx").is_file():
            raise ValueError(f"{path}: no such file, nor an indexed dataset of that name")
        sequence_count(str(path))
        encoded = _stored(path, tokenizer)
    documents, num_bytes, parts = 0, 0, []
    for ids, size in encoded:
        documents, num_bytes = documents + 1, num_bytes + size
        parts.append(np.asarray(ids, dtype=np.int64))
    if not parts:
        raise ValueError(f"{path} has no document")
    tokens = np.concatenate(parts)
    if len(tokens) < 2:
        raise ValueError(f"{path} has a single token: there is nothing to predict")
    windows, lengths = cut_windows(tokens, length)
    return HeldOutText(documents, num_bytes, windows, lengths)


def cut_windows(
    tokens: npt.NDArray[np.int64], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a text into windows, in each of which every token but the first is to be predicted.

    Args:
        tokens: int64 [tokens].
        length: tokens of a window.

    Returns:
        windows, int64 [windows, length], the last one filled up with zeros; and lengths, int64
        [windows]: `length`, for the last one what there was.
    """
    count = -(-len(tokens) // length)
    windows = np.zeros((count, length), dtype=np.int64)
    windows.reshape(-1)[: len(tokens)] = tokens
    lengths = np.full(count, length, dtype=np.int64)
    if count:
        lengths[-1] = len(tokens) - (count - 1) * length
    return windows, lengths


def _encoded(
    documents: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[Sequence[int] | npt.NDArray[np.int64], int]]:
    for document in documents:
        yield [*tokenizer.encode(document), tokenizer.eod], len(document.encode())


def _stored(
    path: Path, tokenizer: Tokenizer
) -> Iterator[tuple[Sequence[int] | npt.NDArray[np.int64], int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(path))
    for first, stop in zip(
        dataset.document_indices[:-1], dataset.document_indices[1:], strict=True
    ):
        ids = np.concatenate([dataset[index] for index in range(first, stop)])
        if ids.max() >= tokenizer.vocab_size:
            raise ValueError(
                f"{path} holds token {ids.max()}, which the tokenizer {tokenizer.path} lacks"
            )
        yield ids.astype(np.int64), len(tokenizer.decode(ids.tolist()).encode())
