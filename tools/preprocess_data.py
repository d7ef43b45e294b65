"""Turn text into an indexed dataset for training.

    python tools/preprocess_data.py corpus/*.jsonl --tokenizer tokenizer.model --output data/corpus

Reads .jsonl (one object a line), .txt (documents separated by blank lines) and .parquet. Writes
OUTPUT.bin and OUTPUT.idx, which appear only when they are whole; name OUTPUT in data.blend.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_kanana.data.documents import read_documents
from megatron_kanana.terminal import byte_progress


def main() -> int:
    """Check the arguments, tokenize, and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, help=".jsonl, .txt or .parquet files")
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="SentencePiece .model file, or folder with Hugging Face's tokenizer.json",
    )
    parser.add_argument("--output", required=True, type=Path, help="dataset path without suffix")
    parser.add_argument("--text-key", default="text", help="JSON field or parquet column")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing processes")
    parser.add_argument("--force", action="store_true", help="replace an existing dataset")
    options = parser.parse_args()
    problems = [f"{path}: no such file" for path in options.inputs if not path.is_file()]
    if not options.tokenizer.exists():
        problems.append(f"{options.tokenizer}: no such file or folder")
    if Path(f"{options.output}.idx").exists() and not options.force:
        problems.append(f"{options.output}.idx exists: give another --output, or --force")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    from megatron_kanana.data.indexed import write_dataset  # here: workers load this file too

    total = sum(path.stat().st_size for path in options.inputs)
    try:
        with byte_progress("tokenizing", total) as on_bytes:
            size = write_dataset(
                _documents(options.inputs, options.text_key),
                options.output,
                options.tokenizer,
                workers=options.workers,
                on_document=on_bytes,
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.output}: {size.documents:,} documents, {size.tokens:,} tokens")
    return 0


def _documents(paths: list[Path], text_key: str) -> Iterator[str]:
    for path in paths:
        yield from read_documents(path, text_key)


if __name__ == "__main__":
    sys.exit(main())
