"""Turn text into an indexed dataset for training.

    python tools/preprocess_data.py corpus/*.jsonl.zst --tokenizer tokenizer --output data/corpus

Reads .jsonl (one object a line), .txt (documents separated by blank lines), both also compressed
as .gz or .zst, and .parquet. Writes OUTPUT.bin and OUTPUT.idx, which appear only when they are
whole; name OUTPUT in data.blend. Beside them OUTPUT.manifest.json has counts and checksums, and
OUTPUT.rejects.jsonl the records that are no documents, with file, line and reason.

A run that was stopped, even killed, goes on when it is started again with the same arguments.

Exit code 2 for a wrong call or a damaged file, 1 if a worker process was killed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from megatron_kanana.data.preprocess import missing_key, preprocess
from megatron_kanana.data.preprocess_job import SHARD_BYTES, Job
from megatron_kanana.data.processes import WorkerKilledError
from megatron_kanana.data.text_shards import file_kind, open_parquet


def main(arguments: list[str] | None = None) -> int:
    """Check the arguments, tokenize, and say what was written; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        problems = find_problems(options)
        if not problems and (problem := missing_key(options.inputs, options.text_key)):
            problems.append(problem)
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 2
        manifest = run(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.output}: {error.strerror}", file=sys.stderr)
        return 2
    except WorkerKilledError:
        print(
            "a worker process was killed, perhaps for want of memory (--workers, --shard-mb);"
            " the same command goes on from the shards that are whole",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print("\n".join(describe(options.output, manifest)))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do the job with a progress bar; the manifest."""
    from megatron_kanana.terminal import byte_progress  # here: workers load this file too

    job = Job(
        tuple(options.inputs),
        options.output,
        options.tokenizer,
        options.text_key,
        options.deduplicate,
        max(1, int(options.shard_mb * 1e6)),
    )
    total = sum(path.stat().st_size for path in options.inputs)
    with byte_progress("tokenizing", total) as on_bytes:
        return preprocess(job, workers=options.workers, force=options.force, on_bytes=on_bytes)


def find_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments, a line each."""
    problems = []
    for path in dict.fromkeys(options.inputs):
        if not path.is_file():
            problems.append(f"{path}: no such file")
            continue
        if options.inputs.count(path) > 1:
            problems.append(f"{path} is given twice")
        try:
            kind, _ = file_kind(path)
            if kind == "parquet":
                open_parquet(path, options.text_key)
        except ValueError as error:
            problems.append(str(error))
    if not options.tokenizer.exists():
        problems.append(f"{options.tokenizer}: no such file or folder")
    if options.workers < 1:
        problems.append(f"--workers {options.workers} is below 1")
    if not options.shard_mb > 0:
        problems.append(f"--shard-mb {options.shard_mb:g} is not above 0")
    folder = options.output.absolute().parent
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    if not existing.is_dir():
        problems.append(f"--output {options.output}: {existing} is a file")
    elif not os.access(existing, os.W_OK):
        problems.append(f"--output {options.output}: {existing} cannot be written to")
    return problems


def describe(output: Path, manifest: dict[str, Any]) -> list[str]:
    """What was written, and what was not."""
    lines = [f"{output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens"]
    if manifest["duplicates"]:
        lines.append(f"{manifest['duplicates']:,} duplicates are left out")
    if manifest["empty"] or manifest["rejected"]:
        lines.append(
            f"{manifest['rejected']:,} records cannot be used and {manifest['empty']:,} are empty:"
            f" see {output}.rejects.jsonl"
        )
    return lines


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, help=".jsonl, .txt (.gz, .zst) or .parquet files"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="SentencePiece .model file, or folder with Hugging Face's tokenizer.json",
    )
    parser.add_argument("--output", required=True, type=Path, help="dataset path without suffix")
    parser.add_argument("--text-key", default="text", help="JSON field or parquet column")
    parser.add_argument(
        "--deduplicate", action="store_true", help="keep only the first of equal documents"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing processes")
    parser.add_argument(
        "--shard-mb",
        type=float,
        default=SHARD_BYTES / 1e6,
        help="MB of text done at a time by a worker, and lost at most when it is killed (67)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace another dataset, or what another interrupted run has done",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
