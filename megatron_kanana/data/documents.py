"""Reading documents from JSON lines, plain text and parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents of one file, in order; empty ones are left out.

    Args:
        path: .jsonl (one object a line), .txt (documents separated by blank lines) or .parquet.
        text_key: field or column that holds the text.

    Raises:
        ValueError: the file's kind is unknown, or a line or column is not as expected.
    """
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".jsonl": _read_json_lines,
        ".txt": _read_text,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}; "
            f"give {', '.join(readers)}"
        )
    return (text for text in readers[path.suffix](path, text_key) if text.strip())


def _read_json_lines(path: Path, text_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_key]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: no text under {text_key!r} ({error!r}); "
                    "give the right --text-key"
                ) from error
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: {text_key!r} is not text but {text!r}")
            yield text


def _read_text(path: Path, _: str) -> Iterator[str]:
    document: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                document.append(line)
            elif document:
                yield "".join(document)
                document = []
    if document:
        yield "".join(document)


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if text_key not in file.schema_arrow.names:
        raise ValueError(
            f"{path}: has no column {text_key!r}, but {file.schema_arrow.names}; "
            "give the right --text-key"
        )
    for batch in file.iter_batches(columns=[text_key], batch_size=1024):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)
