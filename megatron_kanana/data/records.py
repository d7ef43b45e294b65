"""Reading records of a shard: the text of each, or why it has none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_kanana.config.wording import one_line

from .text_shards import Shard, open_parquet

EMPTY = "empty"
"""Reason of a record that is well formed and has nothing in it."""

MISSING = "no text under"
"""How the reason of a record begins that is well formed and lacks the field."""


class Record(NamedTuple):
    """A document, or what stands in its place.

    Attributes:
        line: of the shard, from 1: the line it begins at, or the row of a parquet file.
        text: None if it cannot be used.
        reason: why not; "" if it can.
        data: the text as UTF-8, or the record as it was found.
    """

    line: int
    text: str | None
    reason: str
    data: bytes


class ShardRecords:
    """The records of a shard in order. Lines of a JSON file that are blank are none.

    Attributes:
        lines: lines of the shard, or rows of a parquet file; known once all records were read.

    Args:
        shard: part of a file.
        text_key: field of JSON objects, or column of a parquet file.

    Raises:
        ValueError: a parquet file is damaged.
    """

    def __init__(self, shard: Shard, text_key: str) -> None:
        self.lines = 0
        self._shard, self._text_key = shard, text_key

    def __iter__(self) -> Iterator[Record]:
        """Read them, once."""
        if self._shard.kind == "parquet":
            return self._read_parquet()
        if self._shard.kind == "text":
            return self._read_paragraphs()
        return self._read_json_lines()

    def _read_json_lines(self) -> Iterator[Record]:
        lines = self._shard.read().split(b"\n")
        if not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, start=1):
            if line and not line.isspace():
                yield _json_record(number, line, self._text_key)
        self.lines = len(lines)

    def _read_paragraphs(self) -> Iterator[Record]:
        lines = self._shard.read().splitlines(keepends=True)
        paragraph: list[bytes] = []
        for number, line in enumerate(lines, start=1):
            if not _is_blank(line):
                paragraph.append(line)
            elif paragraph:
                yield _paragraph(number - len(paragraph), paragraph)
                paragraph = []
        if paragraph:
            yield _paragraph(len(lines) - len(paragraph) + 1, paragraph)
        self.lines = len(lines)

    def _read_parquet(self) -> Iterator[Record]:
        import pyarrow

        file = open_parquet(self._shard.path, self._text_key)
        groups = list(range(self._shard.start, self._shard.stop))
        number = 0
        try:
            for batch in file.iter_batches(1024, row_groups=groups, columns=[self._text_key]):
                for value in _as_bytes(batch.column(0)):
                    number += 1
                    yield _decoded(number, value) if value else Record(number, None, EMPTY, b"")
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{self._shard.path} is damaged ({one_line(error)}); repair it or leave it out"
            ) from error
        self.lines = number


class _UnusableError(Exception):
    """Says why a record cannot be used."""


def _json_record(number: int, line: bytes, text_key: str) -> Record:
    try:
        text = _json_text(line.decode(), text_key)
        data = text.encode()
    except UnicodeDecodeError as error:
        reason = _not_utf8(error)
    except UnicodeEncodeError as error:
        reason = f"{text_key!r} holds half of a surrogate pair at character {error.start}"
    except _UnusableError as error:
        reason = str(error)
    else:
        return _checked(number, text, data)
    return Record(number, None, reason, line)


def _json_text(line: str, text_key: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise _UnusableError(f"{MISSING} {text_key!r}: not JSON ({where})") from error
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise _UnusableError(f"{MISSING} {text_key!r}: JSON beyond limits ({error})") from error
    if not isinstance(value, dict):
        raise _UnusableError(f"{MISSING} {text_key!r}: not an object but {_short(value)}")
    if text_key not in value:
        raise _UnusableError(f"{MISSING} {text_key!r}")
    text = value[text_key]
    if not isinstance(text, str):
        raise _UnusableError(f"{text_key!r} is not text but {_short(text)}")
    return text


def _paragraph(number: int, lines: list[bytes]) -> Record:
    data = b"".join(lines).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return _decoded(number, data)


def _is_blank(line: bytes) -> bool:
    return not line.strip() or (
        not line.isascii() and line.decode("utf-8", errors="replace").isspace()
    )


def _as_bytes(column: Any) -> list[bytes | None]:
    """Values of a column of text; as text, one that is not UTF-8 would fail them all."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    large = pyarrow.types.is_large_string(column.type)
    values: list[bytes | None] = column.cast(
        pyarrow.large_binary() if large else pyarrow.binary()
    ).to_pylist()
    return values


def _decoded(number: int, data: bytes) -> Record:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Record(number, None, _not_utf8(error), data)
    return _checked(number, text, data)


def _checked(number: int, text: str, data: bytes) -> Record:
    if not text or text.isspace():
        return Record(number, None, EMPTY, data)
    return Record(number, text, "", data)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
