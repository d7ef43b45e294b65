"""Write a corpus for SCALE=tiny, in the folders that a real one has, from what every machine has.

    python examples/kanana_2_155b_a17b/make_tiny_corpus.py data

english_web and english_books, korean, japanese, chinese, thai and vietnamese are the six-language
sample, of which the last documents are held out; code is Python's standard library; math_stem is
sums; reasoning is the words of the chats that make_tool_conversations.py wrote to data/chat.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_kanana.data.builtin import (
    HELD_OUT_DOCUMENTS,
    LANGUAGES,
    SAMPLES_DIR,
    standard_library_sources,
)
from megatron_kanana.data.documents import read_documents

CODE_BYTES = 1_000_000
NUM_SUMS = 4_000
FOLDERS = {
    "ko": "korean",
    "ja": "japanese",
    "zh": "chinese",
    "th": "thai",
    "vi": "vietnamese",
}


def sums(seed: int) -> Iterator[str]:
    """Sums with their results, a few to a document."""
    generator = random.Random(seed)
    for _ in range(NUM_SUMS // 10):
        pairs = [(generator.randrange(100), generator.randrange(100)) for _ in range(10)]
        yield "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


def write(path: Path, documents: Iterable[str]) -> None:
    """One JSON object a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write every folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write to; chat/ is in it already")
    data: Path = parser.parse_args().folder
    folder = data / "corpus"
    for language in LANGUAGES:
        documents = list(read_documents(SAMPLES_DIR / f"{language}.txt"))
        training = documents[:-HELD_OUT_DOCUMENTS]
        write(data / "held_out" / f"{language}.jsonl", documents[-HELD_OUT_DOCUMENTS:])
        if language == "en":
            write(folder / "english_web" / "00.jsonl", training[::2])
            write(folder / "english_books" / "00.jsonl", training[1::2])
        else:
            write(folder / FOLDERS[language] / "00.jsonl", training)
    write(folder / "code" / "00.jsonl", standard_library_sources(CODE_BYTES))
    write(folder / "math_stem" / "00.jsonl", sums(seed=0))
    reasoning = folder / "reasoning" / "00.jsonl"
    reasoning.parent.mkdir(exist_ok=True)
    (data / "chat" / "text.jsonl").rename(reasoning)


if __name__ == "__main__":
    main()
