"""Small indexed datasets whose tokens are chosen by a test."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 1


def write_documents(prefix: Path, documents: Iterable[Sequence[int]]) -> None:
    """Write token ids as a dataset; each document gets the end-of-document token 1."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        tokens = [*document, END_OF_DOCUMENT]
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def plain_tokenizer(name: str = "plain") -> Any:
    """What datasets ask of a tokenizer."""
    identifiers = collections.OrderedDict(name=name)
    return SimpleNamespace(
        eod=END_OF_DOCUMENT, pad=-1, vocab_size=60_000, unique_identifiers=identifiers
    )
