"""Text that is on every machine: Python's standard library, and a six-language sample.

Nothing is downloaded. The tokenizer is trained and the datasets are written at first use, into a
folder named by what they were made from.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_kanana.config.mixture import BUILTIN_WEIGHTS

from .documents import read_documents
from .indexed import write_dataset
from .tokenizer import train_tokenizer
from .whole_folder import whole_folder

logger = logging.getLogger(__name__)

SAMPLES_DIR = Path(__file__).resolve().parent / "samples"
LANGUAGES = ("ko", "en", "ja", "zh", "th", "vi")
SOURCE_BYTES = 6_000_000  # of the standard library, in alphabetical order
TOKENIZER_SOURCE_BYTES = 2_000_000  # of those, for training the tokenizer
HELD_OUT_DOCUMENTS = 4  # of each language, its last ones; they are not in the datasets
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class BuiltinData:
    """Paths of the tokenizer and of the indexed datasets, with their weights.

    Attributes:
        held_out: a text file by language, of documents that no dataset holds.
    """

    tokenizer: Path
    datasets: tuple[tuple[Path, float], ...]
    held_out: dict[str, Path]


def builtin_data(cache_dir: Path, vocab_size: int) -> BuiltinData:
    """Where the built-in tokenizer and datasets are, or will be."""
    samples = b"".join((SAMPLES_DIR / f"{name}.txt").read_bytes() for name in LANGUAGES)
    sizes = f"{platform.python_version()}/{vocab_size}/{SOURCE_BYTES}/{HELD_OUT_DOCUMENTS}/"
    made_from = sizes.encode() + samples
    folder = cache_dir / f"builtin_{vocab_size}_{hashlib.sha256(made_from).hexdigest()[:10]}"
    return BuiltinData(
        tokenizer=folder / "tokenizer.model",
        datasets=tuple((folder / name, weight) for name, weight in BUILTIN_WEIGHTS.items()),
        held_out={name: folder / "held_out" / f"{name}.txt" for name in LANGUAGES},
    )


def prepare_builtin_data(data: BuiltinData, vocab_size: int) -> None:
    """Train the tokenizer and write the datasets, unless they are there already."""
    folder = data.tokenizer.parent
    if folder.is_dir():
        return
    logger.info("first use: training the tokenizer and writing datasets into %s", folder)
    with whole_folder(folder) as partial:
        tokenizer = partial / data.tokenizer.name
        train_tokenizer(_tokenizer_texts(), vocab_size, tokenizer)
        corpora = (standard_library_sources(SOURCE_BYTES), _interleaved(_training_documents()))
        for (prefix, _), documents in zip(data.datasets, corpora, strict=True):
            size = write_dataset(documents, partial / prefix.name, tokenizer)
            logger.info("%s: %d documents, %d tokens", prefix.name, size.documents, size.tokens)
        for name, texts in _documents().items():
            path = partial / "held_out" / data.held_out[name].name
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(texts[-HELD_OUT_DOCUMENTS:]), encoding="utf-8")


def standard_library_sources(max_bytes: int) -> Iterator[str]:
    """Source files of the standard library, in alphabetical order, up to `max_bytes` in all."""
    root = Path(sysconfig.get_path("stdlib"))
    total = 0
    for file in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(file.relative_to(root).parts):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        total += len(text.encode())
        if total > max_bytes:
            return
        if text.strip():
            yield text


def language_samples() -> Iterator[str]:
    """Documents of the six languages, in turn, so that any share of them holds all six."""
    return _interleaved(_documents())


def _documents() -> dict[str, list[str]]:
    return {name: list(read_documents(SAMPLES_DIR / f"{name}.txt")) for name in LANGUAGES}


def _training_documents() -> dict[str, list[str]]:
    return {name: documents[:-HELD_OUT_DOCUMENTS] for name, documents in _documents().items()}


def _interleaved(documents: dict[str, list[str]]) -> Iterator[str]:
    columns = list(documents.values())
    for index in range(max(map(len, columns))):
        yield from (column[index] for column in columns if index < len(column))


def _tokenizer_texts() -> Iterator[str]:
    yield from standard_library_sources(TOKENIZER_SOURCE_BYTES)
    yield from language_samples()
