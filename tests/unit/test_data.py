"""Documents, tokenizer and indexed datasets: what goes in comes out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_kanana.data.builtin import BuiltinData, language_samples, standard_library_sources
from megatron_kanana.data.documents import read_documents
from megatron_kanana.data.indexed import write_dataset
from megatron_kanana.data.tokenizer import SentencePieceTokenizer

DOCUMENTS = [
    "안녕하세요, 세계!\n\t둘째 줄   with  spaces ",
    "x = [1, 22, 333]\n\n\n    return x\n",
    "สวัสดีชาวโลก 你好，世界 こんにちは Xin chào",
    "emoji \U0001f600 and a rare sign \U00012000 and \u00a0 no-break space",
]


@pytest.fixture
def tokenizer(builtin: BuiltinData) -> SentencePieceTokenizer:
    """The built-in tokenizer with the tests' vocabulary."""
    return SentencePieceTokenizer(builtin.tokenizer)


def test_tokenizer_gives_back_every_text_exactly(tokenizer: SentencePieceTokenizer) -> None:
    texts = [*DOCUMENTS, *language_samples(), *standard_library_sources(200_000)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_gives_back_random_unicode(tokenizer: SentencePieceTokenizer) -> None:
    generator = random.Random(0)
    for _ in range(200):
        codes = (generator.randrange(1, 0x30000) for _ in range(20))
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_has_its_control_pieces(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == 2048
    assert tokenizer.eod == 1
    assert tokenizer.pad == 2
    assert len(tokenizer.encode("12345")) == 5  # digits stay apart


def test_six_languages_are_there_and_interleaved() -> None:
    documents = list(language_samples())
    firsts = "".join(documents[:6])
    for low, high in (("가", "힣"), ("a", "z"), ("ぁ", "ん"), ("一", "龥"), ("ก", "ฮ"), ("ạ", "ỹ")):
        assert any(low <= letter <= high for letter in firsts)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_documents_are_read_in_order_without_empty_ones(suffix: str, tmp_path: Path) -> None:
    rows = [DOCUMENTS[0], "  \n", *DOCUMENTS[1:]]
    path = tmp_path / f"corpus.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, "body": row}) for row in rows) + "\n\n")
    else:
        table = pyarrow.table({"body": [*rows, None], "id": list(range(len(rows) + 1))})
        pyarrow.parquet.write_table(table, path)
    assert list(read_documents(path, "body")) == DOCUMENTS


def test_text_files_are_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("one\ntwo\n\n\n \nthree")
    assert list(read_documents(path)) == ["one\ntwo\n", "three"]


def test_unreadable_documents_are_named(tmp_path: Path) -> None:
    cases = {
        "a.csv": ("x", "cannot read .csv; give .jsonl, .txt, .parquet"),
        "b.jsonl": ('{"text": "x"}\n{"body": "x"}', "line 2: no text under 'text'"),
        "c.jsonl": ("{broken", "line 1: no text"),
        "d.jsonl": ('{"text": 5}', "line 1: 'text' is not text but 5"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / name))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="has no column 'text'"):
        list(read_documents(tmp_path / "e.parquet"))


def test_a_dataset_holds_the_documents_in_order(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    documents = [*DOCUMENTS, *list(language_samples())]
    size = write_dataset(documents, tmp_path / "corpus", tokenizer.path)
    dataset = IndexedDataset(str(tmp_path / "corpus"))
    assert (size.documents, size.tokens) == (len(documents), dataset.sequence_lengths.sum())
    for document, ids in zip(documents, dataset, strict=True):
        assert ids.tolist() == [*tokenizer.encode(document), tokenizer.eod]
        assert tokenizer.decode(ids.tolist()) == document


def test_a_failed_run_leaves_no_dataset(tmp_path: Path, builtin: BuiltinData) -> None:
    def broken() -> object:
        yield "first"
        raise ValueError("second cannot be read")

    with pytest.raises(ValueError, match="second"):
        write_dataset(broken(), tmp_path / "corpus", builtin.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no document"):
        write_dataset([], tmp_path / "corpus", builtin.tokenizer)
    assert not (tmp_path / "corpus.bin").exists()
    assert not (tmp_path / "corpus.idx").exists()
