"""Cutting files of text into shards: whole records, of about a given size, in order.

Shards of a plain file or a parquet file are places in it, which any process can read; those of a
compressed file carry their bytes, since only reading from the start leads there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_kanana.config.wording import one_line

SUFFIXES = {".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Shard:
    """A part of a file.

    Attributes:
        path: the file.
        kind: "json", "text" or "parquet".
        start, stop: bytes of a plain file, or row groups of a parquet file.
        data: what a part of a compressed file holds; None for the others.
        input_bytes: of the file as it lies on the disk, for this part.
    """

    path: Path
    kind: str
    start: int
    stop: int
    data: bytes | None
    input_bytes: int

    def read(self) -> bytes:
        """The bytes of a part of a JSON or text file, without a byte order mark."""
        if self.data is not None:
            data = self.data
        else:
            with self.path.open("rb") as file:
                file.seek(self.start)
                data = file.read(self.stop - self.start)
        return data.removeprefix(BYTE_ORDER_MARK) if self.start == 0 else data


def file_kind(path: Path) -> tuple[str, str | None]:
    """What a file holds ("json", "text" or "parquet"), and how it is compressed.

    Raises:
        ValueError: its name does not tell.
    """
    suffixes = path.suffixes[-2:]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = (suffixes[-2] if len(suffixes) > 1 else "") if compression else path.suffix
    kind = SUFFIXES.get(inner)
    if kind is None or (kind == "parquet" and compression):
        found = "".join(suffixes) if compression else path.suffix
        raise ValueError(
            f"{path}: cannot read {found or 'a file without suffix'}; give {', '.join(SUFFIXES)},"
            " the first two also compressed as .gz or .zst"
        )
    return kind, compression


def cut_shards(path: Path, max_bytes: int, text_key: str = "text") -> Iterator[Shard]:
    """The shards of a file, each ending with the first whole record after `max_bytes`.

    Args:
        path: file of a kind that `file_kind` knows.
        max_bytes: of text; of a parquet file, whole row groups are taken.
        text_key: column of a parquet file.

    Raises:
        ValueError: the file is damaged, or lacks the column.
    """
    kind, compression = file_kind(path)
    if kind == "parquet":
        yield from _cut_parquet(path, max_bytes, text_key)
    elif compression is None:
        yield from _cut_plain(path, kind, max_bytes)
    else:
        yield from _cut_compressed(path, kind, compression, max_bytes)


def open_parquet(path: Path, text_key: str) -> Any:
    """The pyarrow ParquetFile, which has a column of text.

    Raises:
        ValueError: it is none, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        names = schema.names
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path} is no parquet file: {one_line(error)}") from error
    if text_key not in names:
        raise ValueError(
            f"{path}: has no column {text_key!r}, but {names}; give the right --text-key"
        )
    column_type = schema.field(text_key).type
    if pyarrow.types.is_dictionary(column_type):
        column_type = column_type.value_type
    if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
        raise ValueError(
            f"{path}: column {text_key!r} holds {column_type}, not text; give the right --text-key"
        )
    return file


def _cut_plain(path: Path, kind: str, max_bytes: int) -> Iterator[Shard]:
    size = path.stat().st_size
    start = 0
    with path.open("rb") as file:
        while start < size:
            file.seek(start + max_bytes)
            _rest_of_record(file, kind)
            stop = min(file.tell(), size)
            yield Shard(path, kind, start, stop, None, stop - start)
            start = stop


def _cut_compressed(path: Path, kind: str, compression: str, max_bytes: int) -> Iterator[Shard]:
    import pyarrow

    start = consumed = 0
    with path.open("rb") as raw:
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)
        file = io.BufferedReader(stream, 1 << 20)
        while True:
            try:
                data = file.read(max_bytes)
                data += _rest_of_record(file, kind) if data else b""
            except OSError as error:
                raise ValueError(
                    f"{path} is damaged or cut short after {start:,} bytes of text"
                    f" ({one_line(error)}); repair it or leave it out"
                ) from error
            if not data:
                return
            position = raw.tell()
            yield Shard(path, kind, start, start + len(data), data, position - consumed)
            start, consumed = start + len(data), position


def _rest_of_record(file: IO[bytes] | io.BufferedReader, kind: str) -> bytes:
    """Read to the end of the record: of the line, or to the next blank line of text."""
    lines = [file.readline()]
    if kind == "text":
        while lines[-1] and (len(lines) == 1 or lines[-1].strip()):
            lines.append(file.readline())
    return b"".join(lines)


def _cut_parquet(path: Path, max_bytes: int, text_key: str) -> Iterator[Shard]:
    file = open_parquet(path, text_key)
    metadata, size = file.metadata, path.stat().st_size
    column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_key)
    sizes = [
        metadata.row_group(group).column(column).total_uncompressed_size
        for group in range(metadata.num_row_groups)
    ]
    total = max(1, sum(sizes))
    start = before = held = 0
    for group, group_bytes in enumerate(sizes):
        held += group_bytes
        if held >= max_bytes or group == len(sizes) - 1:
            share = size * (before + held) // total - size * before // total
            yield Shard(path, "parquet", start, group + 1, None, share)
            start, before, held = group + 1, before + held, 0
