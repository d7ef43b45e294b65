"""Train a tokenizer on text of several languages, each with its share.

    python tools/train_tokenizer.py --output tokenizer --vocab-size 128256 \\
        --sample en=english.jsonl:0.45 --sample ko=korean.parquet:0.3 --sample code=code.jsonl:0.25

A language whose text is shorter than its share is repeated. OUTPUT is a folder that transformers'
AutoTokenizer and data.tokenizer take; --kind sentencepiece puts tokenizer.model into it as well.
Options can stand in a file, one a line, named as @FILE.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_kanana.data.text_samples import Source, WeightedSample
from megatron_kanana.data.tokenizer_training import (
    KINDS,
    TokenizerShape,
    train_tokenizer_folder,
)


def main(arguments: list[str] | None = None) -> int:
    """Sample, train, write; returns the exit code."""
    options = parse_arguments(arguments)
    problems = [
        f"{source.path}: no such file" for source in options.sample if not source.path.is_file()
    ]
    if options.output.exists() and not options.force:
        problems.append(f"{options.output} exists: give another --output, or --force")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    try:
        shape = TokenizerShape(
            options.kind, options.vocab_size, options.special_slots, options.fill
        )
        sample = WeightedSample(
            options.sample,
            max_bytes=None if options.max_bytes is None else int(options.max_bytes),
            seed=options.seed,
            text_key=options.text_key,
        )
        for line in describe(sample):
            print(line, flush=True)
        train_tokenizer_folder(sample, shape, options.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.output}: {shape.vocab_size:,} tokens")
    return 0


def describe(sample: WeightedSample) -> list[str]:
    """What is taken of each source."""
    total = sum(share.num_bytes for share in sample.shares)
    return [
        f"{source.language}: {share.num_bytes:,} bytes, {100 * share.num_bytes / total:.1f} %,"
        f" {share.num_bytes / share.available:.2f} x {source.path}"
        for source, share in zip(sample.sources, sample.shares, strict=True)
    ]


def parse_source(text: str) -> Source:
    """A source from LANGUAGE=PATH:WEIGHT; without :WEIGHT it is 1."""
    language, equals, rest = text.partition("=")
    path, colon, weight = rest.rpartition(":")
    if not colon:
        path, weight = rest, "1"
    if not (language and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not LANGUAGE=PATH:WEIGHT")
    try:
        return Source(language, Path(path), float(weight))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{weight!r} in {text!r} is no weight") from None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.add_argument(
        "--sample",
        type=parse_source,
        action="append",
        required=True,
        metavar="LANGUAGE=PATH:WEIGHT",
        help="text and its share; once for each file",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=128256, help="(128256)")
    parser.add_argument("--kind", choices=KINDS, default="byte-level", help="(byte-level)")
    parser.add_argument(
        "--special-slots",
        type=int,
        default=256,
        help="ids for ends, turns, tools, thinking; the unnamed ones are reserved (256)",
    )
    parser.add_argument(
        "--fill", action="store_true", help="fill up with reserved tokens if the text gives too few"
    )
    parser.add_argument("--max-bytes", type=float, help="to sample in all (default: all there are)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--text-key", default="text", help="JSON field or parquet column (text)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
