"""Tokenizing documents in several processes; imports nothing heavy, so that workers start fast."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .tokenizer import Tokenizer, load_tokenizer

CHUNK_DOCUMENTS = 32  # documents sent to a worker at a time

Encode = Callable[[Iterable[str]], Iterator[tuple[list[int], int]]]
"""Documents to token ids, ending with the end-of-document token, and lengths in bytes; in order."""

_worker_tokenizer: Tokenizer


@contextlib.contextmanager
def encoder(tokenizer_path: Path, workers: int) -> Iterator[Encode]:
    """A function that tokenizes documents, in this process or in `workers` others."""
    if workers <= 1:
        _start_worker(tokenizer_path)
        yield lambda documents: map(_encode, documents)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (tokenizer_path,)) as pool:
        yield lambda documents: pool.imap(_encode, documents, CHUNK_DOCUMENTS)


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer  # noqa: PLW0603  (one tokenizer a worker process)
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _encode(document: str) -> tuple[list[int], int]:
    return [*_worker_tokenizer.encode(document), _worker_tokenizer.eod], len(document.encode())
