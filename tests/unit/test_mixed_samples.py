"""Samples of a run from its datasets: nothing twice, nothing left out, whatever the run's length.

Every token but the end of document stands once in all datasets, so a token tells its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_kanana.config.mixture import Mixture
from megatron_kanana.data.epochs import Epochs, SampleOrder
from megatron_kanana.data.mixed import HeldOutSamples, MixedSamples, document_segments, prepare_pass
from tests.indexed_datasets import END_OF_DOCUMENT, plain_tokenizer, write_documents

LENGTH = 16
FIRST_TOKEN = {"a": 10_000, "b": 20_000, "c": 30_000}
DOCUMENTS = {"a": 40, "b": 30, "c": 60}
HELD_OUT_PERCENT = 10.0


def number_documents(folder: Path, name: str, seed: int = 0) -> list[range]:
    """Write a dataset of consecutive tokens, cut into documents at random."""
    lengths = np.random.default_rng(seed).integers(2, 40, DOCUMENTS[name])
    ends = FIRST_TOKEN[name] + np.cumsum(lengths)
    documents = [
        range(end - n, end) for end, n in zip(map(int, ends), map(int, lengths), strict=True)
    ]
    write_documents(folder / name, documents)
    return documents


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, list[range]]:
    """Datasets a, b and c in the test's folder, by their documents."""
    return {name: number_documents(tmp_path, name) for name in DOCUMENTS}


def order(folder: Path, seed: int = 5) -> SampleOrder:
    """How the datasets are read."""
    return SampleOrder(plain_tokenizer(), LENGTH, seed, HELD_OUT_PERCENT, folder / "cache")


def read(dataset: Any, samples: range) -> list[tuple[int, ...]]:
    """Tokens of samples."""
    return [tuple(dataset[sample]["tokens"].tolist()) for sample in samples]


def without_ends(samples: list[tuple[int, ...]]) -> list[int]:
    """Their tokens in order, but those that end documents."""
    return [token for sample in samples for token in sample if token != END_OF_DOCUMENT]


def mixed(folder: Path, mixture: Mixture, total: int, consumed: int = 0) -> MixedSamples:
    """Samples of a run over sources a, and b with c."""
    paths = {"a": [folder / "a"], "others": [folder / "b", folder / "c"]}
    samples = MixedSamples(mixture, paths, order(folder), total, document_mask=False)
    prepare(samples, folder, consumed)
    return samples


def prepare(samples: MixedSamples, folder: Path, consumed: int = 0) -> None:
    """Write the index files they need."""
    for path, number in samples.missing(consumed):
        prepare_pass(path, number, order(folder))
    assert not samples.missing(consumed)


def test_each_pass_has_the_training_documents_once_in_an_order_of_its_own(
    corpora: dict[str, list[range]], tmp_path: Path
) -> None:
    training = [token for document in corpora["a"][:36] for token in document]
    epochs = Epochs(tmp_path / "a", order(tmp_path))
    assert epochs.size == (len(training) + 36 - 1) // LENGTH
    for number in range(3):
        epochs.prepare(number)
    passes = [read(epochs, range(n * epochs.size, (n + 1) * epochs.size)) for n in range(3)]
    for samples in passes:
        tokens = without_ends(samples)
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) <= set(training)
        left_over = len(training) + 36 - len(samples) * LENGTH
        assert len(training) - len(tokens) <= left_over <= LENGTH
    assert len({tuple(samples) for samples in passes}) == 3
    third = Epochs(tmp_path / "a", order(tmp_path))
    assert read(third, range(2 * epochs.size, 3 * epochs.size)) == passes[2]
    other = Epochs(tmp_path / "a", order(tmp_path, seed=6))
    other.prepare(0)
    assert read(other, range(epochs.size)) != passes[0]


def test_labels_are_the_next_tokens(corpora: dict[str, list[range]], tmp_path: Path) -> None:
    epochs = Epochs(tmp_path / "b", order(tmp_path))
    epochs.prepare(0)
    for number in range(epochs.size):
        sample = epochs[number]
        assert torch.equal(sample["labels"][:-1], sample["tokens"][1:])
        for token, label in zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True):
            if END_OF_DOCUMENT not in (token, label):
                assert label == token + 1


def test_sources_go_on_through_a_change_and_every_dataset_has_its_share_by_size(
    corpora: dict[str, list[range]], tmp_path: Path
) -> None:
    one_pass = {name: Epochs(tmp_path / name, order(tmp_path)).size for name in DOCUMENTS}
    others = one_pass["b"] + one_pass["c"]
    mixture = Mixture(("a", "others"), [(0, (3, 1)), (20, (0, 1)), (30, (1, 2))])
    total = next(n for n in range(1000) if mixture.counts(n)[1] == others)
    samples = read(mixed(tmp_path, mixture, total), range(total))
    of_source = [mixture.place(number)[0] for number in range(total)]
    for sample, source in zip(samples, of_source, strict=True):
        in_a = all(token < FIRST_TOKEN["b"] for token in sample)
        assert in_a == (source == 0)
    tokens = without_ends([s for s, source in zip(samples, of_source, strict=True) if source])
    assert len(set(tokens)) == len(tokens)  # the first pass: nothing twice, nothing left out
    everything = sum(
        len(range_) + 1 for name in "bc" for range_ in corpora[name][: DOCUMENTS[name] * 9 // 10]
    )
    assert others * LENGTH > everything - 2 * LENGTH - 2
    half = without_ends(
        [s for s, source in zip(samples, of_source, strict=True) if source][: others // 2]
    )
    share = sum(token < FIRST_TOKEN["c"] for token in half) / len(half)
    assert share == pytest.approx(one_pass["b"] / others, abs=0.05)


def test_a_sample_does_not_depend_on_the_length_of_the_run_or_where_it_resumes(
    corpora: dict[str, list[range]], tmp_path: Path
) -> None:
    mixture = Mixture(("a", "others"), [(0, (1, 1)), (70, (1, 3))])
    long = read(mixed(tmp_path / ".", mixture, 600), range(600))
    assert read(mixed(tmp_path, mixture, 90), range(90)) == long[:90]
    for seed in range(3):
        cut = int(np.random.default_rng(seed).integers(1, 500))
        resumed = mixed(tmp_path, mixture, 600, cut)
        assert read(resumed, range(cut, 600)) == long[cut:]


def test_a_new_dataset_at_an_old_path_is_read_anew(
    corpora: dict[str, list[range]], tmp_path: Path
) -> None:
    mixture = Mixture(("a", "others"), [(0, (1, 0))])
    before = read(mixed(tmp_path, mixture, 20), range(20))
    changed = number_documents(tmp_path, "a", seed=9)
    after = read(mixed(tmp_path, mixture, 20), range(20))
    assert after != before
    assert set(without_ends(after)) <= {token for document in changed for token in document}


def test_evaluation_uses_held_out_documents_alone_and_always_the_same(
    corpora: dict[str, list[range]], tmp_path: Path
) -> None:
    mixture = Mixture(("a", "others"), [(0, (1, 1)), (5, (1, 0))])
    paths = {"a": [tmp_path / "a"], "others": [tmp_path / "b", tmp_path / "c"]}
    runs = []
    for _ in range(2):
        held_out = HeldOutSamples(mixture, paths, order(tmp_path), 40, document_mask=False)
        held_out.prepare()
        runs.append(read(held_out, range(40)))
    assert runs[0] == runs[1]
    tokens = without_ends(runs[0])
    allowed = {
        t for name in DOCUMENTS for d in corpora[name][DOCUMENTS[name] * 9 // 10 :] for t in d
    }
    assert set(tokens) <= allowed
    share = sum(token < FIRST_TOKEN["b"] for token in tokens) / len(tokens)
    assert share == pytest.approx(0.5, abs=0.05)


def test_documents_of_a_sample_are_numbered_from_zero(
    corpora: dict[str, list[range]], tmp_path: Path
) -> None:
    mixture = Mixture(("b",), [(0, (1,))])
    samples = MixedSamples(
        mixture, {"b": [tmp_path / "b"]}, order(tmp_path), 10, document_mask=True
    )
    prepare(samples, tmp_path)
    assert samples.has_segment_ids
    for number in range(10):
        sample = samples[number]
        document, expected = 0, []
        for token in sample["tokens"].tolist():
            expected.append(document)
            document += token == END_OF_DOCUMENT
        assert sample["segment_ids"].dtype == torch.int32
        assert sample["segment_ids"].tolist() == expected
    batch = torch.tensor([[5, 1, 6, 1, 1, 7], [1, 5, 5, 5, 5, 5]])
    assert document_segments(batch, 1).tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]]
