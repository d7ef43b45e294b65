"""A user's own corpus: preprocess several formats, then train on a blend of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_kanana.data.builtin import BuiltinData, language_samples, standard_library_sources
from megatron_kanana.data.tokenizer import SentencePieceTokenizer
from tests.launch import Finished, run_python, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code.jsonl, languages.parquet and notes.txt."""
    folder = tmp_path_factory.mktemp("corpus")
    code = list(standard_library_sources(600_000))
    rows = "".join(json.dumps({"content": text}) + "\n" for text in code)
    (folder / "code.jsonl").write_text(rows)
    table = pyarrow.table({"content": list(language_samples())})
    pyarrow.parquet.write_table(table, folder / "languages.parquet")
    (folder / "notes.txt").write_text("\n\n".join(list(language_samples())[:12]))
    return folder


def preprocess(builtin: BuiltinData, *arguments: str) -> Finished:
    """Run the tool with the tests' tokenizer."""
    tokenizer = ("--tokenizer", str(builtin.tokenizer))
    return run_python("tools/preprocess_data.py", *tokenizer, *arguments)


@pytest.mark.timeout(400)
def test_a_preprocessed_blend_is_trained_on(
    corpus: Path, builtin: BuiltinData, cache_dir: Path, tmp_path: Path
) -> None:
    inputs = {"code": "code.jsonl", "languages": "languages.parquet", "notes": "notes.txt"}
    for name, file in inputs.items():
        finished = preprocess(
            builtin,
            *(str(corpus / file), "--text-key", "content"),
            *("--output", str(tmp_path / name), "--workers", "2"),
        )
        assert finished.returncode == 0, finished.stderr
        assert "documents" in finished.stdout
    tokenizer = SentencePieceTokenizer(builtin.tokenizer)
    dataset = IndexedDataset(str(tmp_path / "languages"))
    texts = [tokenizer.decode(ids.tolist()[:-1]) for ids in dataset]
    assert texts == list(language_samples())

    blend = ",".join(f"{{path:{tmp_path / name},weight:{i}}}" for i, name in enumerate(inputs, 1))
    records = train(
        *(tmp_path, cache_dir, "blend", f"data.blend=[{blend}]"),
        *(f"data.tokenizer={builtin.tokenizer}", "stop_after_step=3"),
        "data.held_out_percent=0",
    )
    assert [record["step"] for record in records] == [1, 2, 3]


def test_mistakes_are_answered_before_anything_is_written(
    corpus: Path, builtin: BuiltinData, tmp_path: Path
) -> None:
    output = ("--output", str(tmp_path / "out"))
    cases: dict[str, tuple[str, ...]] = {
        "no such file": (str(corpus / "none.jsonl"), *output),
        "give the right --text-key": (str(corpus / "code.jsonl"), *output),
        "cannot read .bin": (str(tmp_path / "kept.bin"), *output),
        "or --force": (str(corpus / "notes.txt"), "--output", str(tmp_path / "kept")),
    }
    (tmp_path / "kept.idx").write_text("an earlier dataset")
    (tmp_path / "kept.bin").write_text("an earlier dataset")
    wrong_tokenizer = ("--tokenizer", str(corpus / "notes.txt"))
    cases["is not a SentencePiece model"] = (str(corpus / "notes.txt"), *output, *wrong_tokenizer)
    for message, arguments in cases.items():
        finished = preprocess(builtin, *arguments)
        assert finished.returncode == 2
        assert message in finished.stderr
        assert "Traceback" not in finished.stderr
    assert not list(tmp_path.glob("out.*[nx]"))
    assert (tmp_path / "kept.idx").read_text() == "an earlier dataset"
