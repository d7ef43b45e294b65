"""Preprocessing: every record ends somewhere, and the dataset depends on nothing but the text."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_kanana.data import preprocess_shard
from megatron_kanana.data.builtin import BuiltinData, language_samples
from megatron_kanana.data.index_file import token_dtype
from megatron_kanana.data.merge_shards import first_occurrences
from megatron_kanana.data.preprocess import preprocess
from megatron_kanana.data.preprocess_job import Job
from megatron_kanana.data.tokenizer import load_tokenizer
from tests.corpora import BAD_LINES, Corpus, write_corpus

SUFFIXES = (".bin", ".idx", ".rejects.jsonl", ".manifest.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twenty-four documents in five formats."""
    documents = [text.strip() for text in language_samples()]
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents[:24])


@pytest.fixture
def job(corpus: Corpus, builtin: BuiltinData, tmp_path: Path) -> Job:
    """All of the corpus, in shards of a few documents."""
    return Job(tuple(corpus.inputs), tmp_path / "out", builtin.tokenizer, shard_bytes=1500)


def files(job: Job) -> dict[str, bytes]:
    """Contents of the dataset's files; nothing else may be left."""
    assert not job.file(".partial").exists()
    assert not job.file(".finished").exists()
    return {suffix: job.file(suffix).read_bytes() for suffix in SUFFIXES}


def rejects(job: Job) -> list[dict[str, Any]]:
    """What the file of rejects says."""
    return [json.loads(line) for line in job.file(".rejects.jsonl").read_text().splitlines()]


def write_reference(prefix: Path, tokenizer_path: Path, documents: list[str]) -> dict[str, bytes]:
    """The dataset as megatron-core's own builder writes it."""
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in documents:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


def test_all_formats_give_the_dataset_of_megatron_cores_builder(
    job: Job, corpus: Corpus, tmp_path: Path
) -> None:
    manifest = preprocess(job)
    expected = write_reference(tmp_path / "expected", job.tokenizer, corpus.documents)
    assert files(job).items() >= expected.items()
    assert manifest["documents"] == len(corpus.documents)
    assert manifest["tokens"] == IndexedDataset(str(job.output)).sequence_lengths.sum()
    assert manifest["bytes"] == sum(len(text.encode()) for text in corpus.documents)


def test_every_record_is_counted_and_every_bad_one_is_told(job: Job, corpus: Corpus) -> None:
    manifest = preprocess(job)
    for counts in (manifest, *manifest["inputs"]):
        parts = ("documents", "empty", "rejected", "duplicates")
        assert counts["records"] == sum(counts[part] for part in parts)
    assert manifest["rejected"] == len(corpus.rejected) == 2 * len(BAD_LINES) + 3
    assert manifest["empty"] == len(corpus.empty) == 4
    told = {(row["file"], row["line"]): row for row in rejects(job)}
    assert len(told) == len(rejects(job)) == manifest["rejected"] + manifest["empty"]
    for path, line in corpus.empty:
        assert told[str(path), line]["reason"] == "empty"
    for path, line, reason in corpus.rejected:
        assert told[str(path), line]["reason"].startswith(reason)
    # What was found stands there, byte by byte.
    found = [row for row in told.values() if row["file"] == str(corpus.inputs[0])]
    data = {row["record"].encode("utf-8", "surrogateescape") for row in found}
    assert data >= set(BAD_LINES)
    places = [(row["file"], row["line"]) for row in rejects(job)]
    assert places == sorted(
        places, key=lambda place: ([*map(str, job.inputs)].index(place[0]), place[1])
    )


def test_workers_and_shards_do_not_show_in_the_result(job: Job) -> None:
    for deduplicate in (False, True):
        seen = []
        for workers, shard_bytes in ((1, 1), (3, 3000), (1, 10**9)):
            each = dataclasses.replace(job, shard_bytes=shard_bytes, deduplicate=deduplicate)
            preprocess(each, workers=workers, force=True)
            seen.append(files(each))
        assert seen[0] == seen[1] == seen[2]


def test_the_first_of_equal_documents_stays(job: Job, corpus: Corpus, tmp_path: Path) -> None:
    manifest = preprocess(dataclasses.replace(job, deduplicate=True))
    unique = list(dict.fromkeys(corpus.documents))
    assert len(unique) < len(corpus.documents) / 2
    expected = write_reference(tmp_path / "expected", job.tokenizer, unique)
    assert files(job).items() >= expected.items()
    assert manifest["duplicates"] == len(corpus.documents) - len(unique)


def test_first_occurrences_are_those_of_a_set() -> None:
    generator = np.random.default_rng(0)
    digests = generator.integers(0, 5, (400, 2)).astype(np.uint64)
    seen: set[tuple[int, ...]] = set()
    expected = []
    for row in map(tuple, digests.tolist()):
        expected.append(row not in seen)
        seen.add(row)
    assert first_occurrences(digests).tolist() == expected


def test_the_manifest_has_the_checksums_of_all_files(job: Job) -> None:
    import hashlib

    manifest = preprocess(job)
    contents = files(job)
    assert json.loads(contents[".manifest.json"]) == manifest
    described = {Path(entry["path"]): entry for entry in manifest["inputs"]}
    described |= {job.file(suffix): entry for suffix, entry in manifest["outputs"].items()}
    assert set(described) == {*job.inputs, *(job.file(suffix) for suffix in SUFFIXES[:3])}
    for path, entry in described.items():
        assert entry["size"] == path.stat().st_size
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


class KilledError(BaseException):
    """Stands for the end of the process."""


def test_a_run_stopped_before_any_change_of_a_name_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dataclasses.replace(job, inputs=job.inputs[-2:], shard_bytes=8000)
    preprocess(job)
    undisturbed = files(job)
    left = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return original(*arguments, **options)

        return call

    stops = 0
    finished = False
    while not finished:
        for suffix in SUFFIXES:
            job.file(suffix).unlink()
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink", "touch"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            left = stops
            try:
                preprocess(job)
                finished = True
            except KilledError:
                stops += 1
        preprocess(job)
        assert files(job) == undisturbed
    assert stops > 20


def test_what_is_done_is_not_done_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_kanana.data import preprocess as module

    original = preprocess_shard.write_shard
    written: list[str] = []
    left = 0

    def write(shard: Any, prefix: Path, *others: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        written.append(prefix.name)
        original(shard, prefix, *others)

    monkeypatch.setattr(module, "write_shard", write)
    for _ in range(3):
        left = 4
        with pytest.raises(KilledError):
            preprocess(job)
    left = 10**6
    done: list[int] = []
    preprocess(job, on_bytes=done.append)
    assert len(written) == len(set(written)) > 20
    assert sum(done) == sum(path.stat().st_size for path in job.inputs)


def test_the_same_dataset_is_left_and_another_is_kept(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("one\n\ntwo")
    job = dataclasses.replace(job, inputs=(path,))
    manifest = preprocess(job)
    written = job.file(".bin").stat().st_mtime_ns
    assert preprocess(job) == manifest
    assert job.file(".bin").stat().st_mtime_ns == written
    assert not job.file(".rejects.jsonl").exists()
    path.write_text("one\n\nTWO")
    others = [job, dataclasses.replace(job, deduplicate=True)]
    for other in others:
        with pytest.raises(ValueError, match=r"out.idx exists: give another --output, or --force"):
            preprocess(other)
    assert job.file(".bin").stat().st_mtime_ns == written
    preprocess(job, force=True)
    assert job.file(".bin").stat().st_mtime_ns != written


def interrupt(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do everything but putting the shards together."""
    from megatron_kanana.data import preprocess as module

    def stop(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(module, "merge_shards", stop)
        preprocess(job)


def test_shards_made_otherwise_are_thrown_away_only_by_force(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(job, monkeypatch)
    kept = sorted(path.name for path in job.partial.iterdir())
    other = dataclasses.replace(job, inputs=job.inputs[:1], text_key="id", shard_bytes=9999)
    with pytest.raises(ValueError, match="interrupted job with other text_key, shard_bytes: rep"):
        preprocess(other)
    assert sorted(path.name for path in job.partial.iterdir()) == kept
    other = dataclasses.replace(other, text_key="text")
    manifest = preprocess(other, force=True)
    again = files(other)
    assert preprocess(dataclasses.replace(other, shard_bytes=10**6), force=True) == manifest
    assert files(other) == again


def test_a_file_left_out_or_added_costs_nothing_that_is_done(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(job.inputs[1].read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"damaged.jsonl.gz is damaged or cut short after"):
        preprocess(dataclasses.replace(job, inputs=(*job.inputs, damaged)))
    monkeypatch.setattr("megatron_kanana.data.preprocess.write_shard", None)
    fewer = dataclasses.replace(job, inputs=job.inputs[1:], deduplicate=True)
    preprocess(fewer)
    monkeypatch.undo()
    resumed = files(fewer)
    preprocess(fewer, force=True)
    assert files(fewer) == resumed


def test_two_processes_do_not_write_one_dataset(job: Job) -> None:
    job.partial.mkdir()
    with (job.partial / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing this dataset"):
            preprocess(job)


def test_inputs_that_change_meanwhile_are_noticed(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "growing.txt"
    path.write_text("one\n\ntwo\n\nthree")

    def grow(_: int) -> None:
        path.write_text("one\n\ntwo\n\nthree\n\nfour")

    job = dataclasses.replace(job, inputs=(path,))
    with pytest.raises(ValueError, match="the inputs changed while they were read"):
        preprocess(job, on_bytes=grow)
    assert not job.file(".idx").exists()


def test_tokens_are_stored_as_megatron_core_stores_them() -> None:
    for vocab_size in (100, 65499, 65500, 65536, 128256):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
