"""Putting shards together: one dataset, one file of rejects, and a manifest that counts both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from .index_file import write_index
from .preprocess_shard import DOCUMENT, ShardCounts, read_counts, shard_files

COPY_BYTES = 1 << 24


@dataclass
class Counts:
    """What became of records; records = documents + empty + rejected + duplicates.

    Attributes:
        tokens: of the documents, end-of-document tokens included.
        bytes: of the documents' UTF-8 text.
    """

    records: int = 0
    documents: int = 0
    empty: int = 0
    rejected: int = 0
    duplicates: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: Counts) -> None:
        """Count another's as well."""
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))


def merge_shards(
    inputs: Sequence[tuple[Path, Sequence[Path]]],
    outputs: dict[str, Path],
    dtype: np.dtype[np.generic],
    *,
    deduplicate: bool,
) -> list[Counts]:
    """Write the dataset of all shards in order.

    Args:
        inputs: each input file, with the prefixes of its shards.
        outputs: paths to write by suffix: ".bin", ".idx" and ".rejects.jsonl".
        dtype: of the tokens.
        deduplicate: leave out documents whose text came before.

    Returns:
        counts of each input file.
    """
    prefixes = [prefix for _, shards in inputs for prefix in shards]
    documents = [np.fromfile(shard_files(prefix)["documents"], DOCUMENT) for prefix in prefixes]
    kept = [np.ones(len(each), dtype=bool) for each in documents]
    if deduplicate and documents:
        first = first_occurrences(np.concatenate([each["digest"] for each in documents]))
        kept = np.split(first, np.cumsum([len(each) for each in documents])[:-1])
    place = 0
    result = []
    with outputs[".bin"].open("wb") as tokens, outputs[".rejects.jsonl"].open("wb") as rejects:
        for path, shards in inputs:
            counts, lines = Counts(), 0
            for prefix in shards:
                found = read_counts(prefix)
                assert found is not None
                _copy_tokens(prefix, documents[place]["tokens"], kept[place], dtype, tokens)
                _copy_rejects(prefix, path, lines, rejects)
                counts.add(_counts(found, documents[place], kept[place]))
                lines += found.lines
                place += 1
            result.append(counts)
    lengths = [each["tokens"][keep] for each, keep in zip(documents, kept, strict=True)]
    write_index(outputs[".idx"], np.concatenate([np.zeros(0, np.int32), *lengths]), dtype)
    return result


def first_occurrences(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which rows of uint64 [rows, 2] equal no earlier one: bool [rows]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in order
    ordered = digests[order]
    new = np.ones(len(digests), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.zeros(len(digests), dtype=bool)
    first[order[new]] = True
    return first


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _counts(
    found: ShardCounts, documents: npt.NDArray[np.void], kept: npt.NDArray[np.bool_]
) -> Counts:
    written = int(kept.sum())
    return Counts(
        records=found.documents + found.empty + found.rejected,
        documents=written,
        empty=found.empty,
        rejected=found.rejected,
        duplicates=found.documents - written,
        tokens=int(documents["tokens"][kept].sum(dtype=np.int64)),
        bytes=int(documents["bytes"][kept].sum()),
    )


def _copy_tokens(
    prefix: Path,
    lengths: npt.NDArray[np.int32],
    kept: npt.NDArray[np.bool_],
    dtype: np.dtype[np.generic],
    output: IO[bytes],
) -> None:
    with shard_files(prefix)["bin"].open("rb") as file:
        for start, stop in _kept_ranges(lengths, kept):
            file.seek(start * dtype.itemsize)
            left = (stop - start) * dtype.itemsize
            while left:
                chunk = file.read(min(left, COPY_BYTES))
                assert chunk, f"{file.name} is cut short"
                output.write(chunk)
                left -= len(chunk)


def _kept_ranges(
    lengths: npt.NDArray[np.int32], kept: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """Ranges of tokens that hold documents to keep, as long as possible."""
    bounds = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    changes = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    for first, last in changes.reshape(-1, 2):
        yield int(bounds[first]), int(bounds[last])


def _copy_rejects(prefix: Path, path: Path, lines_before: int, output: IO[bytes]) -> None:
    with shard_files(prefix)["rejects"].open("rb") as file:
        for line in file:
            values = json.loads(line)
            values["line"] += lines_before
            output.write(json.dumps({"file": str(path), **values}).encode() + b"\n")
