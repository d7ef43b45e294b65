"""Training tokenizers: shares of languages, exact round trips, the same ids in transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_kanana.data.builtin import SAMPLES_DIR, standard_library_sources
from megatron_kanana.data.chat import render_chat
from megatron_kanana.data.documents import read_documents
from megatron_kanana.data.special_tokens import CONTROL_TOKENS, ROLE_TOKENS, TAGS
from megatron_kanana.data.text_samples import Source, WeightedSample, cut_text
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer
from megatron_kanana.data.tokenizer_report import measure, saving
from tools.train_tokenizer import main

VOCAB_SIZE, SLOTS = 4096, 32
LANGUAGES = ("ko", "ja", "zh", "th", "vi")
RARE = [
    *"\u2581\u00a0\u200b\u200d\u0301\u3099\u0e31\ufe0f\ufffd\ufffe\x00\x1b\r\x85\u2028",
    *" \t\n'0a한か中ก",
    *(" " * 17, "\r\n", "<unk>", "<0x41>", "don't", "12345"),
    *("<think>", "</tool_call>", "<|user|>"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English and code, much; five languages, little; every fourth Korean document held out."""
    folder = tmp_path_factory.mktemp("texts")
    english = [*read_documents(SAMPLES_DIR / "en.txt"), *standard_library_sources(1_000_000)]
    write_lines(folder / "en.jsonl", english)
    for language in LANGUAGES:
        documents = list(read_documents(SAMPLES_DIR / f"{language}.txt"))
        if language == "ko":
            write_lines(folder / "held_out.jsonl", documents[::4])
            documents = [text for place, text in enumerate(documents) if place % 4]
        write_lines(folder / f"{language}.jsonl", documents)
    return folder


def write_lines(path: Path, documents: list[str]) -> None:
    """Documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def train(texts: Path, folder: Path, weights: Mapping[str, float], *arguments: str) -> Path:
    """Train with the command; the folder it wrote."""
    samples = [f"--sample={name}={texts / name}.jsonl:{share}" for name, share in weights.items()]
    sizes = [f"--vocab-size={VOCAB_SIZE}", f"--special-slots={SLOTS}"]
    assert main([*samples, *sizes, f"--output={folder}", *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers of one size: both kinds, weighted, and one without weighting."""
    folder = tmp_path_factory.mktemp("trained")
    weighted = {"en": 0.4, "ko": 0.3, "ja": 0.075, "zh": 0.075, "th": 0.075, "vi": 0.075}
    as_it_is = {name: (texts / f"{name}.jsonl").stat().st_size for name in weighted}
    return {
        "byte-level": train(texts, folder / "byte-level", weighted),
        "sentencepiece": train(texts, folder / "piece", weighted, "--kind=sentencepiece"),
        "unweighted": train(texts, folder / "unweighted", as_it_is),
    }


@pytest.fixture
def tokenizers(trained: dict[str, Path]) -> dict[str, Tokenizer]:
    """The project's readers of them."""
    return {name: load_tokenizer(folder) for name, folder in trained.items()}


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of any code points of all planes, and of troublesome ones; no surrogates."""
    generator = random.Random(seed)
    for number in range(count):
        length = generator.randrange(1, 16)
        if number % 4 == 0:
            yield "".join(generator.choices(RARE, k=length))
        else:
            codes = (generator.randrange(0x110000 - 0x800) for _ in range(length))
            yield "".join(chr(code + 0x800 * (code >= 0xD800)) for code in codes)


def test_weights_save_thirty_percent_of_the_tokens_of_held_out_korean(
    texts: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    measured = {
        name: measure(name, tokenizer, "ko", read_documents(texts / "held_out.jsonl"))
        for name, tokenizer in tokenizers.items()
    }
    assert saving(measured["byte-level"], measured["unweighted"]) >= 0.3
    assert saving(measured["sentencepiece"], measured["unweighted"]) >= 0.3


def test_every_id_is_there_and_named(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.vocab_size == VOCAB_SIZE
        assert tokenizer.unused_ids == []
        names = [tokenizer.name_of(id) for id in range(VOCAB_SIZE)]
        assert len(set(names)) == VOCAB_SIZE
        assert set(names) >= {*CONTROL_TOKENS, *TAGS}
        reserved = sum(name.startswith("<|reserved_") for name in names)
        assert reserved == SLOTS - len(CONTROL_TOKENS) - len(TAGS)
        assert tokenizer.name_of(tokenizer.eod) == CONTROL_TOKENS[0]
        assert tokenizer.name_of(tokenizer.pad) == CONTROL_TOKENS[1]


def test_a_hundred_thousand_random_texts_come_back_exactly(
    tokenizers: dict[str, Tokenizer],
) -> None:
    texts = list(random_texts(0, 100_000))
    for name in ("byte-level", "sentencepiece"):
        tokenizer = tokenizers[name]
        decoded = [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)]
        # SentencePiece's own sign for a space cannot be told from one.
        expected = (
            [text.replace("\u2581", " ") for text in texts] if name != "byte-level" else texts
        )
        assert decoded == expected


def test_transformers_and_both_readers_give_the_same_ids(trained: dict[str, Path]) -> None:
    documents = [text for path in SAMPLES_DIR.iterdir() for text in read_documents(path)]
    texts = [*random_texts(1, 10_000), *documents]
    for folder in trained.values():
        ours = load_tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert len(theirs) == VOCAB_SIZE
        assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eod, ours.pad)
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert (generation.eos_token_id, generation.pad_token_id) == (ours.eod, ours.pad)
        ids = ours.encode_batch(texts)
        assert theirs(texts, split_special_tokens=True)["input_ids"] == ids
        assert [ours.encode(text) for text in texts[::10]] == ids[::10]
        if (folder / "tokenizer.model").exists():
            assert load_tokenizer(folder / "tokenizer.model").encode_batch(texts) == ids


def test_a_conversation_has_one_token_for_each_marker(trained: dict[str, Path]) -> None:
    call = {"name": "weather", "arguments": {"city": "서울"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "서울 날씨? <|user|>"},
        {"role": "assistant", "reasoning_content": "Ask.", "tool_calls": [call]},
        {"role": "tool", "content": "-3"},
    ]
    readers = [load_tokenizer(folder) for folder in trained.values()]
    readers.append(load_tokenizer(trained["sentencepiece"] / "tokenizer.model"))
    for tokenizer in readers:
        text = render_chat(tokenizer, messages, [{"name": "weather"}], thinking=True)
        names = [tokenizer.name_of(id) for id in tokenizer.encode_chat(text)]
        for marker in (*CONTROL_TOKENS, *TAGS):
            assert names.count(marker) == text.count(marker)
        if tokenizer.path.is_dir():
            theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.path)
            options = {"tools": [{"name": "weather"}], "add_generation_prompt": True}
            rendered = theirs.apply_chat_template(messages, enable_thinking=True, **options)
            assert rendered["input_ids"] == tokenizer.encode_chat(text)
        # A document that speaks of turns does not have any; a reply keeps its tags.
        assert not set(ROLE_TOKENS) & {tokenizer.name_of(id) for id in tokenizer.encode(text)}
        reply = '<think>\nAsk.\n</think>\n\n<tool_call>{"name": "f"}</tool_call>'
        assert tokenizer.decode(tokenizer.encode_chat(f"{reply}<|end_of_document|>")) == reply


def test_words_of_different_scripts_and_numbers_do_not_share_tokens(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["byte-level"]
    for parts in (
        ("Python", "은"),
        ("123", "456", "7"),
        ("a", "\n\n", "   ", " b"),
        ("we", "'ll"),
    ):
        apart = [id for part in parts for id in tokenizer.encode(part)]
        assert tokenizer.encode("".join(parts)) == apart


def test_training_again_writes_the_same_files(texts: Path, tmp_path: Path) -> None:
    weights = {"ko": 0.5, "vi": 0.5}
    for kind in ("byte-level", "sentencepiece"):
        options = (f"--kind={kind}", "--vocab-size=1200", "--max-bytes=20e3", "--force")
        written = []
        for seed in (0, 0, 1):
            folder = train(texts, tmp_path / "it", weights, *options, f"--seed={seed}")
            written.append({path.name: path.read_bytes() for path in folder.iterdir()})
        one, again, other = written
        assert one == again
        assert one["tokenizer.json"] != other["tokenizer.json"]
        assert not list(tmp_path.glob("*.partial*"))


def test_shares_are_realised_to_a_piece(texts: Path) -> None:
    sources = [Source("en", texts / "en.jsonl", 3), Source("ko", texts / "ko.jsonl", 1)]
    sample = WeightedSample(sources, max_bytes=200_000, seed=5)
    english, korean = sample.shares
    assert abs(english.num_bytes - 150_000) < 8192
    assert abs(korean.num_bytes - 50_000) < 1024  # its documents are short
    assert korean.whole_passes == 50_000 // korean.available
    taken = list(sample)
    assert sum(len(text.encode()) for text in taken) == english.num_bytes + korean.num_bytes
    assert taken == list(WeightedSample(sources, max_bytes=200_000, seed=5))
    assert taken != list(WeightedSample(sources, max_bytes=200_000, seed=6))


def test_texts_are_cut_after_lines_then_words_and_nothing_is_lost() -> None:
    assert list(cut_text("one\ntwo three\nfour", 10)) == ["one\n", "two three\n", "four"]
    assert list(cut_text("one two three", 9)) == ["one two ", "three"]
    assert list(cut_text("abcdefg", 3)) == ["abc", "def", "g"]


def test_missing_merges_are_filled_only_if_asked_for(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = f"--sample=ko={texts / 'held_out.jsonl'}"
    for kind in ("byte-level", "sentencepiece"):
        options = [sample, f"--kind={kind}", "--vocab-size=9000", f"--output={tmp_path / kind}"]
        assert main(options) == 2
        assert "or fill it with reserved tokens" in capsys.readouterr().err
        assert not (tmp_path / kind).exists()
        assert main([*options, "--fill"]) == 0
        tokenizer = load_tokenizer(tmp_path / kind)
        assert tokenizer.vocab_size == 9000
        assert tokenizer.unused_ids == []
        assert any(tokenizer.name_of(id) == "<|reserved_1000|>" for id in range(9000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample=ko=none.jsonl"], "none.jsonl: no such file"),
        (["--sample=ko=ko.jsonl:0"], "weight 0.0 is not above 0"),
        (["--sample=ko=ko.jsonl:nan"], "weight nan is not above 0"),
        (["--sample=ko=ko.jsonl:much"], "'much' in 'ko=ko.jsonl:much' is no weight"),
        (["--sample=ko.jsonl"], "'ko.jsonl' is not LANGUAGE=PATH:WEIGHT"),
        (["--sample=ko=empty.jsonl"], "empty.jsonl has no document"),
        (["--sample=ko=broken.jsonl"], "broken.jsonl, line 2: no text"),
        (["--sample=ko=ko.csv"], "cannot read .csv"),
        (["--sample=ko=ko.jsonl", "--max-bytes=0"], "0 bytes are not above 0"),
        (["--sample=ko=ko.jsonl", "--max-bytes=9"], "its share is too small"),
        (["--sample=ko=ko.jsonl", "--special-slots=5"], "5 special slots are fewer than the 12"),
        (["--sample=ko=ko.jsonl", "--vocab-size=512"], "512 has no room beside 256 bytes and 256"),
        (["--sample=ko=ko.jsonl", "--output=there"], "there exists: give another --output"),
        (["--sample=ko=ko.jsonl", "--kind=unigram"], "invalid choice: 'unigram'"),
        (
            ["--sample=ko=ko.jsonl", "--kind=sentencepiece", "--vocab-size=600"],
            "the samples have more characters than pieces",
        ),
    ],
)
def test_a_wrong_call_is_answered_in_a_line(
    texts: Path,
    empty_folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (empty_folder / "ko.jsonl").write_bytes((texts / "ko.jsonl").read_bytes())
    (empty_folder / "ko.csv").write_text("text\n")
    (empty_folder / "empty.jsonl").write_text("\n")
    (empty_folder / "broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (empty_folder / "there").mkdir()
    try:
        code: int | str | None = main(["--output=tokenizer", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert not usage or usage[0].startswith("usage:")
    assert not Path("tokenizer").exists()
    assert not list(Path("there").iterdir())
