"""Writing megatron-core indexed datasets from documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from .encoding import encoder
from .tokenizer import load_tokenizer


@dataclass
class DatasetSize:
    """What was written."""

    documents: int = 0
    tokens: int = 0


def write_dataset(
    documents: Iterable[str],
    prefix: Path,
    tokenizer_path: Path,
    *,
    workers: int = 1,
    on_document: Callable[[int], None] | None = None,
) -> DatasetSize:
    """Tokenize documents into `prefix`.bin and `prefix`.idx, in the order given.

    The files appear only when they are whole: an interrupted run leaves files ending in .partial.

    Args:
        documents: texts; each gets an end-of-document token.
        prefix: path of the dataset without suffix; its folder is made.
        tokenizer_path: SentencePiece model or folder of a Hugging Face tokenizer.
        workers: processes that tokenize.
        on_document: called with each document's length in bytes once it is written.

    Raises:
        ValueError: there was no document.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = {
        suffix: prefix.parent / f"{prefix.name}{suffix}.partial" for suffix in (".bin", ".idx")
    }
    builder = IndexedDatasetBuilder(
        str(partial[".bin"]), dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    size = DatasetSize()
    with encoder(tokenizer_path, workers) as encode:
        for ids, num_bytes in encode(documents):
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            size.documents += 1
            size.tokens += len(ids)
            if on_document is not None:
                on_document(num_bytes)
    if not size.documents:
        raise ValueError(f"{prefix}: there is no document to write")
    builder.finalize(str(partial[".idx"]))
    for suffix, file in partial.items():
        file.rename(prefix.parent / f"{prefix.name}{suffix}")
    return size
