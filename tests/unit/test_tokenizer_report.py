"""The report on tokenizers: counts against closed forms, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kanana.data.builtin import BuiltinData, language_samples
from megatron_kanana.data.tokenizer import load_tokenizer
from megatron_kanana.data.tokenizer_report import count_vocabulary, measure, saving
from tests.hugging_face_tokenizers import save_byte_level_tokenizer
from tools.tokenizer_report import main


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 256 bytes and 3 special tokens: a token a byte."""
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_level_tokenizer(folder, ["a"], 259)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with merges of six languages."""
    folder = tmp_path_factory.mktemp("learned")
    save_byte_level_tokenizer(folder, language_samples(), 2000)
    return folder


def test_a_token_a_byte_has_the_sizes_of_utf8(bytes_only: Path) -> None:
    documents = ["한국어 tokens", "x 가\n나", " "]
    measured = measure("bytes", load_tokenizer(bytes_only), "ko", documents)
    assert (measured.words, measured.characters, measured.num_bytes) == (5, 16, 26)
    assert measured.tokens == 26
    assert measured.tokens_per_byte == 1
    assert measured.tokens_per_character == 26 / 16
    assert measured.tokens_per_word == 26 / 5
    assert measured.exact
    with pytest.raises(ValueError, match="the text for ko holds no word"):
        measure("bytes", load_tokenizer(bytes_only), "ko", ["  "])


def test_hangul_is_counted_where_a_whole_character_is(bytes_only: Path, learned: Path) -> None:
    assert count_vocabulary("bytes", load_tokenizer(bytes_only)).hangul == 0
    vocabulary = json.loads((learned / "tokenizer.json").read_text())["model"]["vocab"]
    from_byte = {letter: value for value, letter in byte_letters().items()}
    texts = [
        bytes(from_byte[letter] for letter in token).decode(errors="ignore")
        for token in vocabulary
        if not token.startswith("<|")
    ]
    korean = sum(any("가" <= letter <= "힣" for letter in text) for text in texts)
    counted = count_vocabulary("learned", load_tokenizer(learned))
    assert counted.hangul == korean > 50
    assert counted.size == 2000


def byte_letters() -> dict[int, str]:
    """Letters that stand for bytes in byte-level BPE, as GPT-2 published them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    letters = {value: chr(value) for value in printable}
    return letters | {value: chr(256 + place) for place, value in enumerate(others)}


def test_the_report_names_every_language_and_tokenizer(
    bytes_only: Path,
    learned: Path,
    builtin: BuiltinData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ko.txt").write_text("한국어 문장이다.\n\n둘째 문서.")
    (tmp_path / "en.jsonl").write_text(json.dumps({"text": "An English text."}))
    arguments = [
        *(f"--tokenizer=learned={learned}", f"--tokenizer=built-in={builtin.tokenizer}"),
        *(f"--tokenizer=bytes={bytes_only}", f"--text=ko={tmp_path / 'ko.txt'}"),
        *(f"--text=en={tmp_path / 'en.jsonl'}", f"--json={tmp_path / 'report.json'}"),
        f"--plot={tmp_path / 'report.png'}",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["baseline"] == "bytes"
    rows = {(row["language"], row["tokenizer"]): row for row in report["measurements"]}
    assert len(rows) == 6
    for (language, name), row in rows.items():
        assert any(
            line.startswith(f"| {language} | {name} | {row['tokens']} |") for line in printed
        )
        assert row["saving"] == 1 - row["tokens"] / row["num_bytes"]
        assert row["tokens_per_word"] == row["tokens"] / row["words"]
    assert [row["tokenizer"] for row in report["vocabularies"]] == ["learned", "built-in", "bytes"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_tokenizer_that_changes_the_text_is_named(
    builtin: BuiltinData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text("a \u2581 b")  # SentencePiece's own sign for a space
    assert main([f"--tokenizer=t={builtin.tokenizer}", f"--text=x={tmp_path / 'x.txt'}"]) == 0
    assert "t changes the x text" in capsys.readouterr().err


def test_saving_is_the_share_of_the_baselines_tokens(bytes_only: Path, learned: Path) -> None:
    one, other = (
        measure("", load_tokenizer(folder), "ko", language_samples())
        for folder in (learned, bytes_only)
    )
    assert saving(one, other) == 1 - one.tokens / other.tokens > 0.3
    assert saving(other, other) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer=a=none"], "none: no such file or folder"),
        (["--tokenizer=a=there"], "there has no tokenizer.json"),
        (["--tokenizer=a=ko.txt"], "ko.txt is not a SentencePiece model"),
        (["--text=other=none.txt"], "none.txt: no such file"),
        (["--text=ko=ko.txt"], "--text ko=… is given twice"),
        (["--text=x=blank.txt"], "the text for x holds no word"),
        (["--baseline=other"], "--baseline other is none of"),
        (["--json=none/report.json"], "none/report.json: no such folder"),
        (["--text==ko.txt"], "'=ko.txt' is not NAME=PATH"),
    ],
)
def test_a_wrong_call_is_answered_in_a_line(
    learned: Path,
    empty_folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (empty_folder / "ko.txt").write_text("한국어")
    (empty_folder / "blank.txt").write_text(" \n")
    (empty_folder / "there").mkdir()
    try:
        code: int | str | None = main([f"--tokenizer={learned}", "--text=ko=ko.txt", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
