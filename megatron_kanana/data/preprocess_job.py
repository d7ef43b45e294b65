"""A preprocessing job as it lies on the disk: its folder, its dataset, and whose they are.

OUTPUT.partial/ holds shards that are done, named by the file that they are of, and `NOTE`, which
says how they were made: they serve also if a file is left out or another one is added. Once
everything is merged, `READY` says what of, and each file of the dataset gets its name, the index
last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .merge_shards import file_digest
from .tokenizer import Tokenizer

MANIFEST = ".manifest.json"
SUFFIXES = (".bin", ".rejects.jsonl", MANIFEST, ".idx")
"""Of the dataset's files, in the order in which they get their names."""

LOCK, NOTE, READY = "lock", "shards.json", "ready.json"
FINISHED = ".finished"
SHARD_BYTES = 1 << 26


@dataclass(frozen=True)
class Job:
    """What to make of what.

    Attributes:
        inputs: files that `file_kind` knows, in order.
        output: path of the dataset without suffix.
        tokenizer: SentencePiece model or folder of a Hugging Face tokenizer.
        text_key: field or column that holds the text.
        deduplicate: keep only the first of documents that are equal, byte by byte.
        shard_bytes: text of a shard; the dataset does not depend on it.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: Path
    text_key: str = "text"
    deduplicate: bool = False
    shard_bytes: int = SHARD_BYTES

    def file(self, suffix: str) -> Path:
        """A file of the dataset."""
        return self.output.with_name(f"{self.output.name}{suffix}")

    @property
    def partial(self) -> Path:
        """Folder of what an unfinished run has done."""
        return self.file(".partial")

    def merged(self) -> dict[str, Path]:
        """The dataset's files by suffix, before they get their names."""
        return {suffix: self.partial / f"merged{suffix}" for suffix in SUFFIXES}


def settings_of(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a dataset depends on besides its inputs."""
    return {
        "tokenizer": {
            "path": str(job.tokenizer),
            "sha256": tokenizer.unique_identifiers["sha256"],
            "vocab_size": tokenizer.vocab_size,
        },
        "text_key": job.text_key,
        "deduplicate": job.deduplicate,
    }


def describe(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the files of a job depend on: `settings_of`, and the inputs as they are now."""
    return {**settings_of(job, tokenizer), "inputs": [shard_name(path) for path in job.inputs]}


def shard_name(path: Path) -> str:
    """A name for the shards of a file, another one as soon as the file changes."""
    stat = path.stat()
    identity = f"{path.absolute()}/{stat.st_size}/{stat.st_mtime_ns}"
    return hashlib.blake2b(os.fsencode(identity), digest_size=10).hexdigest()


@contextmanager
def held_folder(partial: Path) -> Iterator[None]:
    """Make the folder of a job, or take the one that is there, for this process alone.

    Raises:
        ValueError: another process has it.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial}: another process is writing this dataset") from None
        yield


def claim_folder(job: Job, tokenizer: Tokenizer, *, force: bool) -> None:
    """Keep the shards that the folder holds if they serve this job, else empty it.

    Raises:
        ValueError: they do not, and `force` is not set.
    """
    note = job.partial / NOTE
    settings = {**settings_of(job, tokenizer), "shard_bytes": job.shard_bytes}
    del settings["deduplicate"]  # comes after the shards
    if note.exists():
        earlier = _read_json(note) or {}
        if earlier == settings:
            return
        differing = [key for key, value in settings.items() if earlier.get(key) != value]
        if not force:
            raise ValueError(
                f"{job.partial} holds an interrupted job with other {', '.join(differing)}: repeat"
                " that one to go on, or throw it away with --force"
            )
        note.unlink()
    for path in job.partial.iterdir():
        if path.name != LOCK:
            path.unlink()
    _write_json(note, settings)


def is_ready(job: Job, description: dict[str, Any]) -> bool:
    """Whether the merged files are whole and of this job; those of another one are deleted."""
    ready = job.partial / READY
    if not ready.exists():
        return False
    if _read_json(ready) == description:
        return True
    ready.unlink()
    for path in job.merged().values():
        path.unlink(missing_ok=True)
    return False


def mark_ready(job: Job, description: dict[str, Any]) -> None:
    """Note that the merged files are whole, once they are on the disk."""
    for path in job.merged().values():
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _write_json(job.partial / READY, description)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of this module's own; None if it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    written = path.with_name(f"{path.name}.new")
    written.write_text(json.dumps(values), encoding="utf-8")
    written.replace(path)


def publish(job: Job) -> None:
    """Give the merged files their names; called again, go on with those that have none yet."""
    merged = job.merged()
    if merged[".bin"].exists():
        # Without its index, an earlier dataset is no longer taken for whole.
        for suffix in (".idx", ".rejects.jsonl"):
            job.file(suffix).unlink(missing_ok=True)
    for suffix, path in merged.items():
        if path.exists():
            path.replace(job.file(suffix))
    # One rename takes all shards away: none is ever missing from a job that seems unfinished.
    remove_finished(job)
    job.partial.rename(job.file(FINISHED))
    remove_finished(job)


def remove_finished(job: Job) -> None:
    """Delete the folder of a job whose dataset is whole, if there still is one."""
    shutil.rmtree(job.file(FINISHED), ignore_errors=True)


def existing_manifest(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest of the dataset that is there, if this job would write the same.

    Raises:
        ValueError: it would not.
    """
    try:
        manifest = read_manifest(job)
        same = _is_of(job, tokenizer, manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # it is no manifest
        same = False
    if not same:
        raise ValueError(replaces(job))
    return manifest


def _is_of(job: Job, tokenizer: Tokenizer, manifest: dict[str, Any]) -> bool:
    """Whether this job would write the dataset of a manifest."""
    settings = settings_of(job, tokenizer)
    inputs = [(entry["path"], entry["size"], entry["sha256"]) for entry in manifest["inputs"]]
    return (
        {key: manifest.get(key) for key in settings} == settings
        and [entry[:2] for entry in inputs] == [(str(p), p.stat().st_size) for p in job.inputs]
        and all(job.file(suffix).exists() for suffix in manifest["outputs"])
        and [entry[2] for entry in inputs] == [file_digest(path) for path in job.inputs]
    )


def read_manifest(job: Job) -> dict[str, Any]:
    """The manifest of the dataset that is there."""
    manifest: dict[str, Any] = json.loads(job.file(MANIFEST).read_text(encoding="utf-8"))
    return manifest


def replaces(job: Job) -> str:
    """What to say of a dataset that is in the way."""
    return f"{job.file('.idx')} exists: give another --output, or --force"
