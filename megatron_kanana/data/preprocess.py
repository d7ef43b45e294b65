"""Turning text files into a dataset, shard by shard, so that a job that was killed goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .index_file import token_dtype
from .merge_shards import Counts, file_digest, merge_shards
from .preprocess_job import (
    MANIFEST,
    Job,
    claim_folder,
    describe,
    existing_manifest,
    held_folder,
    is_ready,
    mark_ready,
    publish,
    read_manifest,
    remove_finished,
    replaces,
    settings_of,
    shard_name,
)
from .preprocess_shard import read_counts, write_shard
from .processes import Task, run_tasks
from .records import MISSING, ShardRecords
from .text_shards import Shard, cut_shards
from .tokenizer import Tokenizer, load_tokenizer

REJECTS = ".rejects.jsonl"


def preprocess(
    job: Job,
    *,
    workers: int = 1,
    force: bool = False,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the dataset with rejects and manifest; go on where an interrupted run stopped.

    The files do not depend on the number of workers, nor on interruptions. A dataset that is there
    already, made of the same files in the same way, is left as it is.

    Args:
        job: what to do.
        workers: processes that tokenize; 1 tokenizes in this one.
        force: replace another dataset, and throw away shards made with other settings.
        on_bytes: called with the bytes of input that have been done since the last call.

    Returns:
        the manifest: settings, `Counts` of all and of each input, sizes and SHA-256 of all files.

    Raises:
        ValueError: one line that says what is wrong with the call or the files.
        WorkerKilledError: a worker was killed.
    """
    tokenizer = load_tokenizer(job.tokenizer)
    remove_finished(job)
    exists = job.file(".idx").exists() and not force
    if exists and not job.partial.exists():
        return existing_manifest(job, tokenizer)
    with held_folder(job.partial):
        description = describe(job, tokenizer)
        claim_folder(job, tokenizer, force=force)
        if not is_ready(job, description):
            if exists:
                raise ValueError(replaces(job))
            shards = _tokenize(job, workers, on_bytes)
            manifest = _merge(job, tokenizer, shards, description["inputs"])
            if description != describe(job, tokenizer):
                raise ValueError("the inputs changed while they were read: start again")
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            job.merged()[MANIFEST].write_text(text, encoding="utf-8")
            mark_ready(job, description)
        publish(job)
    return read_manifest(job)


def missing_key(inputs: Sequence[Path], text_key: str, records: int = 100) -> str | None:
    """Why the text key must be wrong, or None: no input has it in its first records.

    Raises:
        ValueError: an input is damaged.
    """
    lacking = 0
    for path in inputs:
        shard = next(cut_shards(path, 1 << 20, text_key), None)
        for record in islice(ShardRecords(shard, text_key) if shard else (), records):
            if record.text is not None:
                return None
            lacking += record.reason == f"{MISSING} {text_key!r}"
    if not lacking:
        return None
    return f"no record at the start of any input has {text_key!r}; give the right --text-key"


def _tokenize(job: Job, workers: int, on_bytes: Callable[[int], None]) -> list[list[Path]]:
    """Write the shards that are missing; the prefixes of all, for each input."""
    shards: list[list[Path]] = [[] for _ in job.inputs]
    tasks = _tasks(job, shards, on_bytes)
    for done in run_tasks(workers, _prepare, (job.tokenizer,), tasks):
        on_bytes(done)
    return shards


def _merge(
    job: Job, tokenizer: Tokenizer, shards: Sequence[Sequence[Path]], names: Sequence[str]
) -> dict[str, Any]:
    """Put all shards together; returns the manifest."""
    outputs = job.merged()
    inputs = list(zip(job.inputs, shards, strict=True))
    dtype = token_dtype(tokenizer.vocab_size)
    counted = merge_shards(inputs, outputs, dtype, deduplicate=job.deduplicate)
    total = Counts()
    for counts in counted:
        total.add(counts)
    if not total.documents:
        problem = _no_document(job, total, outputs[REJECTS])
        shutil.rmtree(job.partial)
        raise ValueError(problem)
    if not total.empty + total.rejected:
        outputs[REJECTS].unlink()
    return {
        **settings_of(job, tokenizer),
        **dataclasses.asdict(total),
        "inputs": [
            {
                "path": str(path),
                "size": path.stat().st_size,
                "sha256": (job.partial / f"{name}.sha256").read_text(),
                **dataclasses.asdict(counts),
            }
            for path, name, counts in zip(job.inputs, names, counted, strict=True)
        ],
        "outputs": {
            suffix: {"size": path.stat().st_size, "sha256": file_digest(path)}
            for suffix, path in outputs.items()
            if path.exists() and suffix != MANIFEST
        },
    }


_tokenizer: Tokenizer


def _prepare(tokenizer: Path) -> None:
    global _tokenizer  # noqa: PLW0603  (one tokenizer a process)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    _tokenizer = load_tokenizer(tokenizer)


def _tasks(job: Job, shards: list[list[Path]], on_bytes: Callable[[int], None]) -> Iterator[Task]:
    """What is left to do; notes all shards of each input as it comes to them."""
    for place, path in enumerate(job.inputs):
        name = shard_name(path)
        digest = job.partial / f"{name}.sha256"
        if not digest.exists():
            yield _write_digest, (path, digest)
        for number, shard in enumerate(cut_shards(path, job.shard_bytes, job.text_key)):
            prefix = job.partial / f"{name}_{number:06d}"
            shards[place].append(prefix)
            if read_counts(prefix) is None:
                yield _write_shard, (shard, prefix, job.text_key)
            else:
                on_bytes(shard.input_bytes)


def _write_shard(shard: Shard, prefix: Path, text_key: str) -> int:
    write_shard(shard, prefix, _tokenizer, text_key)
    return shard.input_bytes


def _write_digest(path: Path, output: Path) -> int:
    written = output.with_name(f"{output.name}.{os.getpid()}")
    written.write_text(file_digest(path))
    written.replace(output)
    return 0


def _no_document(job: Job, counts: Counts, rejects: Path) -> str:
    with rejects.open(encoding="utf-8") as file:
        line = file.readline()
    first = ""
    if line:
        values = json.loads(line)
        first = f", the first at line {values['line']} of {values['file']}: {values['reason']}"
    return (
        f"{job.output}: there is no document to write; of {counts.records} records"
        f" {counts.empty} are empty and {counts.rejected} cannot be used{first}"
    )
