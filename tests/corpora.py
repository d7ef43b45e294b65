"""A small corpus in every format that tools/preprocess_data.py reads, with records gone bad."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet

HALF_A_PAIR = b'{"text": "\\ud83d"}'
BAD_LINES = {
    b'{"text": "cut off': "no text under 'text': not JSON (Unterminated string",
    b'{"body": "x"}': "no text under 'text'",
    b'["text"]': "no text under 'text': not an object but [\"text\"]",
    b'{"text": 5}': "'text' is not text but 5",
    b'{"text": null}': "'text' is not text but null",
    b'{"text": ["x"]}': "'text' is not text but [\"x\"]",
    b'{"text": "\xff\xfe"}': "not UTF-8: byte 0xff at 10",
    HALF_A_PAIR: "'text' holds half of a surrogate pair at character 0",
    b"[" * 100_000: "no text under 'text': JSON beyond limits",
    b'{"text": ' + b"1" * 5000 + b"}": "no text under 'text': JSON beyond limits",
}
"""Lines of a JSON file that hold no document, and how the reason begins."""


@dataclass
class Corpus:
    """Files and what is in them.

    Attributes:
        inputs: the files, in order.
        documents: of all files, in order, duplicates included.
        empty: file and line of records with nothing in them.
        rejected: file, line and beginning of the reason of records that cannot be used.
    """

    inputs: list[Path] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    empty: list[tuple[Path, int]] = field(default_factory=list)
    rejected: list[tuple[Path, int, str]] = field(default_factory=list)


def write_corpus(folder: Path, documents: list[str]) -> Corpus:
    """Write the documents five times over: as JSON lines, .gz, text, .zst and parquet.

    Documents must hold no blank line.
    """
    corpus = Corpus()
    lines: list[bytes] = []
    for place, text in enumerate(documents):
        lines.append(json.dumps({"id": place, "text": text}, ensure_ascii=place % 2 == 0).encode())
    bad = list(BAD_LINES)
    step = max(1, len(lines) // len(bad))
    for place, line in enumerate(bad):
        lines.insert(place * (step + 1), line)
    lines.insert(3, b"")
    lines.insert(5, b'{"text": " \\n"}')
    data = b"\xef\xbb\xbf" + b"\n".join(lines)
    for name in ("lines.jsonl", "lines.jsonl.gz"):
        path = folder / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        corpus.inputs.append(path)
        corpus.documents += documents
        corpus.empty.append((path, 6))
        corpus.rejected += [
            (path, lines.index(line) + 1, reason) for line, reason in BAD_LINES.items()
        ]
        corpus.rejected.sort(key=lambda each: (corpus.inputs.index(each[0]), each[1]))
    _write_text(folder, documents, corpus)
    _write_parquet(folder / "rows.parquet", documents, corpus)
    return corpus


def _write_text(folder: Path, documents: list[str], corpus: Corpus) -> None:
    broken = b"a paragraph\nthat is not \xc3( UTF-8"
    paragraphs = [text.encode() for text in documents]
    paragraphs.insert(2, broken)
    data = b"\n\n \r\n".join(paragraphs)
    line = data[: data.index(broken)].count(b"\n") + 1
    compressed = folder / "text.txt.zst"
    with pyarrow.CompressedOutputStream(str(compressed), "zstd") as stream:
        stream.write(data)
    (folder / "text.txt").write_bytes(data)
    for path in (folder / "text.txt", compressed):
        corpus.inputs.append(path)
        last = len(documents) - 1
        corpus.documents += [text + "\n" * (place < last) for place, text in enumerate(documents)]
        corpus.rejected.append((path, line, "not UTF-8: byte 0xc3 at 24"))


def _write_parquet(path: Path, documents: list[str], corpus: Corpus) -> None:
    values = [text.encode() for text in documents]
    values[1:1] = [b"\xff", b"  "]
    binary = pyarrow.array([*values, None], pyarrow.binary())
    # A string column with a value that is not UTF-8, as careless writers make them.
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())
    table = pyarrow.table({"id": list(range(len(text))), "text": text})
    pyarrow.parquet.write_table(table, path, row_group_size=max(1, len(text) // 4))
    corpus.inputs.append(path)
    corpus.documents += documents
    corpus.rejected.append((path, 2, "not UTF-8: byte 0xff at 0"))
    corpus.empty += [(path, 3), (path, len(text))]
