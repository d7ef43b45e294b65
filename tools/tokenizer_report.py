"""Compare tokenizers: tokens a word, a character and a byte, by language.

    python tools/tokenizer_report.py --tokenizer ours=tokenizer --tokenizer other=other/folder \\
        --text ko=korean.jsonl --text en=english.txt --plot report.png --json report.json

Prints Markdown. A tokenizer is a SentencePiece .model file or a folder with Hugging Face's
tokenizer.json. Savings are against --baseline, by default the last tokenizer named. Text should be
such as no tokenizer was trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kanana.data.documents import read_documents
from megatron_kanana.data.tokenizer import load_tokenizer
from megatron_kanana.data.tokenizer_report import (
    Measurement,
    as_table,
    baselines,
    count_vocabulary,
    measure,
    saving,
)


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    options = parse_arguments(arguments)
    if problems := find_problems(options):
        print("\n".join(problems), file=sys.stderr)
        return 2
    baseline = options.baseline or options.tokenizer[-1][0]
    try:
        tokenizers = {name: load_tokenizer(path) for name, path in options.tokenizer}
        measurements = [
            measure(
                name,
                tokenizer,
                language,
                itertools.islice(read_documents(path, options.text_key), options.documents),
            )
            for language, path in options.text
            for name, tokenizer in tokenizers.items()
        ]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    vocabularies = [count_vocabulary(name, each) for name, each in tokenizers.items()]
    print("\n".join(as_table(measurements, vocabularies, baseline)))
    for each in measurements:
        if not each.exact:
            print(f"{each.tokenizer} changes the {each.language} text", file=sys.stderr)
    if options.json is not None:
        of = baselines(measurements, baseline)
        report = {
            "baseline": baseline,
            "measurements": [
                {
                    **dataclasses.asdict(each),
                    "tokens_per_word": each.tokens_per_word,
                    "tokens_per_character": each.tokens_per_character,
                    "tokens_per_byte": each.tokens_per_byte,
                    "saving": saving(each, of[each.language]),
                }
                for each in measurements
            ],
            "vocabularies": [dataclasses.asdict(each) for each in vocabularies],
        }
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        options.json.write_text(text, encoding="utf-8")
    if options.plot is not None:
        plot(options.plot, measurements)
    return 0


def find_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the options, a line each."""
    problems = [f"{path}: no such file" for _, path in options.text if not path.is_file()]
    problems += [
        f"{path}: no such file or folder" for _, path in options.tokenizer if not path.exists()
    ]
    for option, pairs in (("--tokenizer", options.tokenizer), ("--text", options.text)):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [f"{option} {name}=… is given twice" for name in twice]
    names = [name for name, _ in options.tokenizer]
    if options.baseline is not None and options.baseline not in names:
        problems.append(f"--baseline {options.baseline} is none of {', '.join(names)}")
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            problems.append(f"{path}: no such folder")
    return problems


def plot(path: Path, measurements: Sequence[Measurement]) -> None:
    """Bars of tokens a word, a character and a byte by language, one for each tokenizer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    languages = list(dict.fromkeys(each.language for each in measurements))
    names = list(dict.fromkeys(each.tokenizer for each in measurements))
    width = 0.8 / len(names)
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axes, unit in zip(panels, ("word", "character", "byte"), strict=True):
        for place, name in enumerate(names):
            values = [
                getattr(each, f"tokens_per_{unit}")
                for each in measurements
                if each.tokenizer == name
            ]
            offset = (place - (len(names) - 1) / 2) * width
            axes.bar([index + offset for index in range(len(languages))], values, width, label=name)
        axes.set_xticks(range(len(languages)), languages)
        axes.set_ylabel(f"tokens a {unit}")
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_yscale("log")  # languages that write no spaces stand far above the others
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH, or PATH alone, which is its own name."""
    name, equals, path = text.partition("=")
    if not name or (equals and not path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path if equals else name)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pair: dict[str, Any] = {"type": parse_named_path, "action": "append", "required": True}
    parser.add_argument("--tokenizer", **pair, metavar="NAME=PATH", help="once for each")
    parser.add_argument("--text", **pair, metavar="LANGUAGE=PATH", help="once for each language")
    parser.add_argument("--baseline", help="name of the tokenizer to compare with (the last)")
    parser.add_argument("--documents", type=int, help="read so many of each text (all)")
    parser.add_argument("--text-key", default="text", help="JSON field or parquet column (text)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
