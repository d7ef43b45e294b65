"""Writing a small indexed dataset from documents at hand; files of text: `preprocess.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .index_file import token_dtype, write_index
from .tokenizer import load_tokenizer

BATCH_DOCUMENTS = 64


@dataclass
class DatasetSize:
    """What was written."""

    documents: int = 0
    tokens: int = 0


def write_dataset(documents: Iterable[str], prefix: Path, tokenizer_path: Path) -> DatasetSize:
    """Tokenize documents into `prefix`.bin and `prefix`.idx, in the order given.

    The files appear only when they are whole: an interrupted run leaves files ending in .partial.

    Args:
        documents: texts; each gets an end-of-document token.
        prefix: path of the dataset without suffix; its folder is made.
        tokenizer_path: SentencePiece model or folder of a Hugging Face tokenizer.

    Raises:
        ValueError: there was no document.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = {suffix: prefix.with_name(f"{prefix.name}{suffix}") for suffix in (".bin", ".idx")}
    partial = {suffix: path.with_name(f"{path.name}.partial") for suffix, path in files.items()}
    lengths: list[int] = []
    iterator = iter(documents)
    with partial[".bin"].open("wb") as file:
        while batch := list(itertools.islice(iterator, BATCH_DOCUMENTS)):
            for ids in tokenizer.encode_batch(batch):
                file.write(np.array([*ids, tokenizer.eod], dtype).tobytes())
                lengths.append(len(ids) + 1)
    if not lengths:
        raise ValueError(f"{prefix}: there is no document to write")
    write_index(partial[".idx"], np.array(lengths, np.int32), dtype)
    for suffix, path in partial.items():
        path.rename(files[suffix])
    return DatasetSize(len(lengths), sum(lengths))
