"""Tokens a second of tools/preprocess_data.py beside calls of the tokenizer alone.

python -m benchmarks.preprocess_data --name preprocess_data_cpu

The text is that of the six-language sample, Python's standard library and installed packages, as
JSON lines. The command is timed whole, from its start to the last file, less what it takes for a
single document: that has a row of its own. The tokenizer is timed on the same documents, loaded and
in memory, in batches, in as many processes at the same time, since two busy cores are slower than
one. What is compared are CPU seconds of all processes together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_kanana.config.saved import TOKENIZER_FILE
from megatron_kanana.data.builtin import SAMPLES_DIR, language_samples, standard_library_sources
from megatron_kanana.data.documents import read_documents
from megatron_kanana.data.text_samples import Source, WeightedSample
from megatron_kanana.data.tokenizer import load_tokenizer
from megatron_kanana.data.tokenizer_training import KINDS, TokenizerShape, train_tokenizer_folder

from .card import Row, write_card

TOOL = Path(__file__).resolve().parent.parent / "tools" / "preprocess_data.py"
BATCH = 256


@dataclass
class Cost:
    """Seconds by the clock and of the CPU."""

    wall: float
    cpu: float


def main() -> None:
    """Measure both kinds of tokenizer and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--megabytes", type=float, default=50, help="of text")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        size = write_corpus(corpus, int(options.megabytes * 1e6))
        rows.append(Row("text", "MB", size / 1e6))
        for kind in KINDS:
            tokenizer = train(kind, options.vocab_size, corpus, folder)
            rows += measure(kind, tokenizer, corpus, options.workers, options.runs)
    print(write_card(options.name, rows).read_text())


def write_corpus(path: Path, max_bytes: int) -> int:
    """Write real text without repetition; the bytes of text in it."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in itertools.chain(language_samples(), sources()):
            if size >= max_bytes:
                break
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return size


def sources() -> Iterator[str]:
    """Python sources of the standard library, then of installed packages."""
    yield from standard_library_sources(10**12)
    for file in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text


def train(kind: str, vocab_size: int, corpus: Path, folder: Path) -> Path:
    """A tokenizer of the kind, trained on part of the text and the six languages."""
    sources = [Source("code", corpus, 4)]
    sources += [Source(path.stem, path, 1) for path in sorted(SAMPLES_DIR.glob("*.txt"))]
    sample = WeightedSample(sources, max_bytes=8_000_000)
    train_tokenizer_folder(sample, TokenizerShape(kind, vocab_size, fill=True), folder / kind)
    return folder / kind / TOKENIZER_FILE if kind == "sentencepiece" else folder / kind


def measure(kind: str, tokenizer: Path, corpus: Path, workers: list[int], runs: int) -> list[Row]:
    """Time the tokenizer and the command in turn."""
    rows = []
    one = corpus.with_name("one.jsonl")
    with corpus.open(encoding="utf-8") as file:
        one.write_text(file.readline(), encoding="utf-8")
    for count in workers:
        alone, starts, command = [], [], []
        for _ in range(runs):
            tokens, cost = call_tokenizer(tokenizer, corpus, count)
            alone.append(cost.cpu)
            starts.append(run_command(tokenizer, one, count).cpu)
            command.append(run_command(tokenizer, corpus, count).cpu)
        start = statistics.median(starts)
        ours = tokens / (statistics.median(command) - start)
        peer = tokens / statistics.median(alone)
        what = f"{kind}, {count} worker{'s' if count > 1 else ''}"
        name = "the tokenizer alone" + (f", {count} processes" if count > 1 else "")
        rows.append(Row(what, "tokens a CPU second", ours, name, peer, ours / peer, runs))
        rows.append(Row(f"{what}: start and end", "CPU seconds", start, runs=runs))
    return rows


def call_tokenizer(path: Path, corpus: Path, processes: int) -> tuple[int, Cost]:
    """Tokens of all documents, with an end of document each, and what they cost."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(call_on_part, path, corpus, place, processes) for place in range(processes)
        ]
        parts = [each.result() for each in running]
    tokens = sum(part for part, _ in parts)
    return tokens, Cost(max(cost.wall for _, cost in parts), sum(cost.cpu for _, cost in parts))


def call_on_part(path: Path, corpus: Path, place: int, parts: int) -> tuple[int, Cost]:
    """As `call_tokenizer`, on every `parts`-th document; neither is loaded on the clock."""
    tokenizer = load_tokenizer(path)
    documents = list(read_documents(corpus))[place::parts]
    wall, cpu = time.monotonic(), time.process_time()
    tokens = len(documents)
    for start in range(0, len(documents), BATCH):
        tokens += sum(map(len, tokenizer.encode_batch(documents[start : start + BATCH])))
    return tokens, Cost(time.monotonic() - wall, time.process_time() - cpu)


def run_command(tokenizer: Path, corpus: Path, workers: int) -> Cost:
    """What the whole command costs, its worker processes included."""
    arguments = [str(corpus), f"--tokenizer={tokenizer}", f"--workers={workers}"]
    arguments += [f"--output={corpus.parent / 'dataset'}", "--force", "--shard-mb=8"]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, TOOL, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Cost(time.monotonic() - start, usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    main()
