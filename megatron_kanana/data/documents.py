"""Reading documents from JSON lines, plain text and parquet files, all of which must be sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .records import EMPTY, ShardRecords
from .text_shards import cut_shards

READ_BYTES = 1 << 22


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents of one file, in order; empty ones are left out.

    Args:
        path: .jsonl (one object a line), .txt (documents separated by blank lines) or .parquet;
            the first two may be compressed, .gz or .zst.
        text_key: field or column that holds the text.

    Raises:
        ValueError: the file's kind is unknown, or a line or column is not as expected.
    """
    lines = 0
    for shard in cut_shards(path, READ_BYTES, text_key):
        records = ShardRecords(shard, text_key)
        for record in records:
            if record.text is not None:
                yield record.text
            elif record.reason != EMPTY:
                raise ValueError(f"{path}, line {lines + record.line}: {record.reason}")
        lines += records.lines
