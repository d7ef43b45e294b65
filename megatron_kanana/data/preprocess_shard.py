"""Tokenizing one shard into files of its own; the work of one process at a time.

A shard NAME is whole when NAME.json is there, which is written last:

NAME.bin          tokens of its documents, one after another
NAME.documents    `DOCUMENT` of each
NAME.rejects      JSON lines: the records that are no documents
NAME.json         `ShardCounts`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .index_file import token_dtype
from .records import EMPTY, Record, ShardRecords
from .text_shards import Shard
from .tokenizer import Tokenizer

BATCH_BYTES = 1 << 20

DOCUMENT = np.dtype([("tokens", "<i4"), ("bytes", "<i8"), ("digest", "<u8", 2)])
"""Of a document: its tokens, the end-of-document token included; bytes of UTF-8; a BLAKE2b hash."""


@dataclass
class ShardCounts:
    """What a shard held.

    Attributes:
        lines: or rows of a parquet file.
        documents: tokenized, with the duplicates among them.
        empty: records with nothing in them.
        rejected: records that cannot be used.
    """

    lines: int = 0
    documents: int = 0
    empty: int = 0
    rejected: int = 0


def shard_files(prefix: Path) -> dict[str, Path]:
    """The files of the shard `prefix` by suffix."""
    return {
        suffix: prefix.with_name(f"{prefix.name}.{suffix}")
        for suffix in ("bin", "documents", "rejects", "json")
    }


def write_shard(shard: Shard, prefix: Path, tokenizer: Tokenizer, text_key: str) -> None:
    """Tokenize a shard; a file that is there already is replaced.

    Raises:
        ValueError: the file is damaged.
    """
    files = shard_files(prefix)
    counts = ShardCounts()
    dtype = token_dtype(tokenizer.vocab_size)
    records = ShardRecords(shard, text_key)
    with (
        _whole(files["bin"]) as tokens,
        _whole(files["documents"]) as documents,
        _whole(files["rejects"]) as rejects,
    ):
        for batch in _batches(records, rejects, counts):
            encoded = tokenizer.encode_batch([record.text or "" for record in batch])
            described = np.zeros(len(batch), DOCUMENT)
            for place, (ids, record) in enumerate(zip(encoded, batch, strict=True)):
                ids.append(tokenizer.eod)
                tokens.write(np.array(ids, dtype).tobytes())
                described[place] = len(ids), len(record.data), _digest(record.data)
            documents.write(described.tobytes())
            counts.documents += len(batch)
    counts.lines = records.lines
    with _whole(files["json"]) as file:
        file.write(json.dumps(dataclasses.asdict(counts)).encode())


def read_counts(prefix: Path) -> ShardCounts | None:
    """What a shard held, or None if it is not whole."""
    try:
        return ShardCounts(**json.loads(shard_files(prefix)["json"].read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):  # not there, or damaged
        return None


def _batches(
    records: ShardRecords, rejects: IO[bytes], counts: ShardCounts
) -> Iterator[list[Record]]:
    """Documents in batches of `BATCH_BYTES`; what is none is counted and written."""
    batch: list[Record] = []
    size = 0
    for record in records:
        if record.text is None:
            counts.empty += record.reason == EMPTY
            counts.rejected += record.reason != EMPTY
            rejects.write(_reject_line(record))
            continue
        batch.append(record)
        size += len(record.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reject_line(record: Record) -> bytes:
    # Bytes that are not UTF-8 become halves of surrogate pairs, which Python turns back again.
    found = record.data.decode("utf-8", errors="surrogateescape")
    values = {"line": record.line, "reason": record.reason, "record": found}
    return json.dumps(values).encode() + b"\n"


def _digest(data: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class _whole:  # noqa: N801  (reads as a function)
    """A file that gets its name when it is complete and on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # With the process in its name: one that was given up may still be writing the same shard.
        self._partial = path.with_name(f"{path.name}.{os.getpid()}")
        self._file = self._partial.open("wb")

    def __enter__(self) -> IO[bytes]:
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()
