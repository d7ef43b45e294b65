"""Held-out sets of a run: which text they hold, and what is wrong with one is told by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kanana.config import ConfigurationError, Environment, Settings, load_settings
from megatron_kanana.data.builtin import BuiltinData, language_samples
from megatron_kanana.data.documents import read_documents
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer
from megatron_kanana.training.run import evaluation_sets


@pytest.fixture
def tokenizer(builtin: BuiltinData) -> Tokenizer:
    """The built-in tokenizer with the tests' vocabulary."""
    return load_tokenizer(builtin.tokenizer)


def settings(**paths: Path) -> Settings:
    """A run with these sets."""
    sets = ",".join(f"{{name:{name},path:{path}}}" for name, path in paths.items())
    return load_settings([f"data.evaluation_sets=[{sets}]"], Environment())


def test_the_built_in_languages_hold_documents_that_no_dataset_has(
    builtin: BuiltinData, tokenizer: Tokenizer
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(builtin.datasets[1][0]))
    trained = {tokenizer.decode(ids.tolist()[:-1]) for ids in dataset}
    held_out = {text for path in builtin.held_out.values() for text in read_documents(path)}
    assert len(builtin.held_out) == 6 and len(held_out) == 24
    assert {text.strip() for text in held_out}.isdisjoint(text.strip() for text in trained)
    everything = {text.strip() for text in language_samples()}
    assert {text.strip() for text in held_out | trained} == everything
    sets = evaluation_sets(settings(**builtin.held_out), tokenizer)
    assert [text.documents for text in sets.values()] == [4] * 6
    for name, path in builtin.held_out.items():
        texts = list(read_documents(path))
        assert sets[name].num_bytes == sum(len(text.encode()) for text in texts)
        assert sets[name].tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_sets_that_cannot_be_read_are_all_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    contents = {"table.csv": "a,b", "broken.jsonl": "{", "empty.txt": "\n", "good.txt": "one two"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    paths = {name.split(".")[0]: tmp_path / name for name in contents}
    with pytest.raises(ConfigurationError) as caught:
        evaluation_sets(settings(**paths), tokenizer)
    told = {problem.setting: problem.reason for problem in caught.value.problems}
    assert set(told) == {f"data.evaluation_sets ({name})" for name in ("table", "broken", "empty")}
    assert "cannot read .csv" in told["data.evaluation_sets (table)"]
    assert "line 1" in told["data.evaluation_sets (broken)"]
    assert "has no document" in told["data.evaluation_sets (empty)"]
