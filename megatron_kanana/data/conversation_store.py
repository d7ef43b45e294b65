"""Conversations made ready once: tokens on disk, and a list of what could not be used."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_kanana.config.chat_settings import ChatSettings

from .conversations import parse_conversation, read_records
from .export_tokenizer import CHAT_TEMPLATE
from .supervised import ConversationEncoder, Example, TooLongError
from .tokenizer import Tokenizer, load_tokenizer
from .whole_folder import whole_folder

CHUNK_RECORDS = 64  # records sent to a worker at a time
FORMAT = 1  # of a store's files; stores of another are made anew
REJECTED_FILE = "rejected.jsonl"

_Record = tuple[str, int, bytes]
_Result = Example | tuple[str, bool]  # or why it cannot be used, and whether for its length


@dataclass(frozen=True)
class Summary:
    """What became of the records.

    Attributes:
        records: how many there were.
        rejected: how many of them cannot be used, too long ones among them.
        too_long: how many of these were too long.
        truncated: how many were cut.
        tokens, trained_tokens: of those that are used.
        reasons: the first rejected ones, each with file, line and reason.
    """

    records: int
    rejected: int
    too_long: int
    truncated: int
    tokens: int
    trained_tokens: int
    reasons: list[str]


class ConversationStore:
    """Conversations on disk, mapped into memory.

    Attributes:
        summary: what became of the records.
        rejected_path: a JSON line for each unusable record: file, line, reason, the record itself.

    Args:
        folder: made by `prepare_conversations`.
    """

    def __init__(self, folder: Path) -> None:
        self.rejected_path = folder / REJECTED_FILE
        self.summary = Summary(**json.loads((folder / "summary.json").read_text()))
        self._begins: npt.NDArray[np.int64] = np.load(folder / "begins.npy")
        self._tokens = _mapped(folder / "tokens.bin", np.int32)
        self._trained = _mapped(folder / "trained.bin", np.bool_)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def lengths(self) -> npt.NDArray[np.int64]:
        """Predictions of each conversation: one less than its tokens."""
        return np.diff(self._begins) - 1

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokens of a conversation, and which of them are learnt."""
        place = slice(self._begins[index], self._begins[index + 1])
        return self._tokens[place], self._trained[place]


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def prepare_conversations(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    settings: ChatSettings,
    max_tokens: int,
    cache_dir: Path,
) -> Path:
    """Read, check, render and tokenize conversations, unless that was done before.

    Args:
        files: .jsonl and .parquet files.
        tokenizer: of the model.
        settings: what is learnt of a conversation.
        max_tokens: predictions that fit into a sample.
        cache_dir: folder of stores; each is named by what it was made from.

    Returns:
        folder of a `ConversationStore`.

    Raises:
        ValueError: a file cannot be read at all. What is wrong with a record is noted instead.
    """
    folder = cache_dir / f"conversations_{_fingerprint(files, tokenizer, settings, max_tokens)}"
    if folder.is_dir():
        return folder
    records = (
        (str(path), number, record) for path in files for number, record in read_records(path)
    )
    with (
        whole_folder(folder) as partial,
        _encoder(tokenizer.path, settings, max_tokens) as encode,
    ):
        _write(partial, encode(records))
    return folder


def _fingerprint(
    files: Sequence[Path], tokenizer: Tokenizer, settings: ChatSettings, max_tokens: int
) -> str:
    made_from = {
        "format": FORMAT,
        "tokenizer": tokenizer.unique_identifiers,
        "template": CHAT_TEMPLATE.read_text(encoding="utf-8"),
        "settings": {**dataclasses.asdict(settings), "workers": 0, "max_rejected_percent": 0},
        "max_tokens": max_tokens,
    }
    digest = hashlib.sha256(json.dumps(made_from).encode())
    for path in files:
        digest.update(f"{path} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:24]


def _write(folder: Path, results: Iterable[tuple[_Record, _Result]]) -> None:
    begins, counts = [0], {"records": 0, "rejected": 0, "too_long": 0, "truncated": 0}
    trained_tokens = 0
    reasons: list[str] = []
    with contextlib.ExitStack() as stack:
        tokens = stack.enter_context((folder / "tokens.bin").open("wb"))
        trained = stack.enter_context((folder / "trained.bin").open("wb"))
        rejected = stack.enter_context((folder / REJECTED_FILE).open("w", encoding="utf-8"))
        for (path, number, record), result in results:
            counts["records"] += 1
            if isinstance(result, Example):
                tokens.write(np.array(result.tokens, dtype=np.int32).tobytes())
                trained.write(np.array(result.trained, dtype=np.bool_).tobytes())
                begins.append(begins[-1] + len(result.tokens))
                trained_tokens += sum(result.trained)
                counts["truncated"] += result.truncated
                continue
            reason, too_long = result
            counts["rejected"] += 1
            counts["too_long"] += too_long
            if len(reasons) < 10:
                reasons.append(f"{path}, line {number}: {reason}")
            entry = {"file": path, "line": number, "reason": reason}
            entry["record"] = record.decode("utf-8", errors="backslashreplace")
            rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
    np.save(folder / "begins.npy", np.array(begins, dtype=np.int64))
    summary = Summary(**counts, tokens=begins[-1], trained_tokens=trained_tokens, reasons=reasons)
    (folder / "summary.json").write_text(json.dumps(dataclasses.asdict(summary), indent=2))


_Encode = Callable[[Iterable[_Record]], Iterator[tuple[_Record, _Result]]]

_worker_encoder: ConversationEncoder


@contextlib.contextmanager
def _encoder(tokenizer: Path, settings: ChatSettings, max_tokens: int) -> Iterator[_Encode]:
    """A function that makes examples of records, in order, in this process or in others."""
    arguments = (tokenizer, settings, max_tokens)
    if not settings.workers:
        _start_worker(*arguments)
        yield lambda records: map(_encode, records)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(settings.workers, _start_worker, arguments) as pool:
        yield lambda records: pool.imap(_encode, records, CHUNK_RECORDS)


def _start_worker(tokenizer: Path, settings: ChatSettings, max_tokens: int) -> None:
    global _worker_encoder  # noqa: PLW0603  (one encoder a worker process)
    _worker_encoder = ConversationEncoder(load_tokenizer(tokenizer), settings, max_tokens)


def _encode(record: _Record) -> tuple[_Record, _Result]:
    try:
        return record, _worker_encoder.encode(parse_conversation(record[2]))
    except ValueError as error:
        return record, (str(error), isinstance(error, TooLongError))
    except RecursionError:
        return record, ("its values are nested too deeply", False)
