"""Hugging Face tokenizers: read, kept in checkpoints, and written from SentencePiece models."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece import sentencepiece_model_pb2

from megatron_kanana.config import checkpoint_tokenizer
from megatron_kanana.data.builtin import BuiltinData, language_samples, standard_library_sources
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from megatron_kanana.data.indexed import write_dataset
from megatron_kanana.data.tokenizer import (
    END_OF_DOCUMENT,
    PADDING,
    SentencePieceTokenizer,
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
)
from tests.hugging_face_tokenizers import BEGIN, END_OF_TURN, save_byte_level_tokenizer

RARE = "\u2581\u00a0\u200b\u200d\u0301\u3099\u0e31\ufe0f\ufffd\ufffe\x00\x1b\r\x85\u2028\U0001f468"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 600 tokens."""
    folder = tmp_path_factory.mktemp("published")
    save_byte_level_tokenizer(folder, language_samples(), 600)
    return folder


@pytest.fixture(scope="module")
def exported(builtin: BuiltinData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in SentencePiece model as Hugging Face's files."""
    folder = tmp_path_factory.mktemp("exported")
    save_hugging_face_tokenizer(builtin.tokenizer, folder)
    return folder


def random_texts(seed: int, count: int) -> list[str]:
    """Any Unicode, runs of blanks, characters of the vocabulary, rare ones, names of pieces."""
    generator = random.Random(seed)
    code_points = [*range(0xD800), *range(0xE000, 0x110000)]
    kinds: list[list[str]] = [
        [chr(generator.choice(code_points)) for _ in range(500)],
        [" ", "  ", "\n", "\t", "\r\n", " " * 30, "a", ".", "\u2581"],
        [chr(code) for code in range(128)],
        [
            *RARE,
            "\U0001f600",
            "<unk>",
            "<0x41>",
            "</s>",
            "def ",
            "self",
            "0123",
            "한",
            "글",
            "가 나",
        ],
        ["a", "b", "aa", " ", "=" * 17],
    ]
    return [
        "".join(generator.choices(generator.choice(kinds), k=generator.randrange(1, 50)))
        for _ in range(count)
    ]


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str], **options: Any) -> None:
    """Same ids, and the same text back, in transformers."""
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, **options)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_exported_tokenizer_equals_sentencepiece_in_transformers(
    builtin: BuiltinData, exported: Path
) -> None:
    ours = SentencePieceTokenizer(builtin.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eod, ours.pad)
    assert theirs.eos_token == END_OF_DOCUMENT
    documents = [*language_samples(), *standard_library_sources(400_000)]
    assert_same(ours, theirs, documents)
    assert_same(ours, theirs, random_texts(0, 4000))


def test_names_of_control_pieces_are_text_only_if_asked_for(
    builtin: BuiltinData, exported: Path
) -> None:
    ours = SentencePieceTokenizer(builtin.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    text = f"a{END_OF_DOCUMENT}\n{PADDING} b"
    assert_same(ours, theirs, [text], split_special_tokens=True)
    assert ours.eod not in ours.encode(text)
    assert theirs(text)["input_ids"].count(ours.eod) == 1
    # The project's own reader takes documents as text, and rendered conversations not.
    read = load_tokenizer(exported)
    assert read.encode(text) == ours.encode(text)
    assert read.encode_chat(f"a{END_OF_DOCUMENT}\n") == ours.encode_chat(f"a{END_OF_DOCUMENT}\n")
    assert ours.encode_chat(f"a{END_OF_DOCUMENT}\n").count(ours.eod) == 1


def test_any_order_of_merges_is_translated(builtin: BuiltinData, tmp_path: Path) -> None:
    """Random pieces over two letters, against every text of up to ten letters."""
    texts = ["".join(t) for n in range(1, 11) for t in itertools.product("ab", repeat=n)]
    pieces = ["".join(t) for n in range(2, 7) for t in itertools.product("ab", repeat=n)]
    for seed in range(6):
        generator = random.Random(seed)
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(builtin.tokenizer.read_bytes())
        del model.pieces[261:]
        for rank, piece in enumerate([*generator.sample(pieces, 20 + 15 * seed), "a", "b"]):
            model.pieces.add(piece=piece, score=-rank)
        (tmp_path / "random.model").write_bytes(model.SerializeToString())
        save_hugging_face_tokenizer(tmp_path / "random.model", tmp_path)
        ours, theirs = load_tokenizer(tmp_path / "random.model"), load_tokenizer(tmp_path)
        assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


def test_untranslatable_models_are_refused(builtin: BuiltinData, tmp_path: Path) -> None:
    cases: list[tuple[str, str, str, Any]] = [
        ("it is no BPE model", "trainer_spec", "model_type", 1),
        ("it has no byte fallback", "trainer_spec", "byte_fallback", False),
        ("it adds a space in front", "normalizer_spec", "add_dummy_prefix", True),
        ("it normalises the text", "normalizer_spec", "remove_extra_whitespaces", True),
        ("it does not mark spaces", "normalizer_spec", "escape_whitespaces", False),
        ("a character that is no piece", "pieces", "piece", "\U00012000x"),
        ("it has unused pieces", "pieces", "type", 5),
    ]
    for reason, part, field, value in cases:
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(builtin.tokenizer.read_bytes())
        setattr(model.pieces[300] if part == "pieces" else getattr(model, part), field, value)
        (tmp_path / "changed.model").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=reason):
            save_hugging_face_tokenizer(tmp_path / "changed.model", tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_published_tokenizer_reads_as_transformers_does(published: Path) -> None:
    ours = load_tokenizer(published)
    theirs = transformers.AutoTokenizer.from_pretrained(published)
    assert ours.vocab_size == len(theirs) == 600
    assert ours.name_of(ours.eod) == "<|end_of_text|>"
    assert {ours.name_of(token) for token in ours.stop_ids} == {"<|end_of_text|>", END_OF_TURN}
    assert ours.pad == -1  # it has none of its own, only an end that must not be masked
    texts = [*language_samples(), *random_texts(1, 300)]
    assert_same(ours, theirs, texts, add_special_tokens=False)
    for text in texts[:50]:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
        assert ours.name_of(ours.encode_prompt(text)[0]) == BEGIN


def test_ids_that_stand_for_nothing_are_known(published: Path, tmp_path: Path) -> None:
    save_hugging_face_tokenizer(published, tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 605
    assert tokenizer.unused_ids == [599, 600, 601, 602, 603]


def test_a_checkpoint_keeps_either_kind(
    builtin: BuiltinData, published: Path, tmp_path: Path
) -> None:
    text = "def f(x):\n    return '한국어'"
    for name, source in {"sentencepiece": builtin.tokenizer, "published": published}.items():
        checkpoint = tmp_path / name
        checkpoint.mkdir()
        copy_tokenizer(source, checkpoint)
        kept = load_tokenizer(checkpoint_tokenizer(checkpoint))
        original = load_tokenizer(source)
        assert kept.encode(text) == original.encode(text)
        assert kept.unique_identifiers == original.unique_identifiers
        assert kept.stop_ids == original.stop_ids
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.model nor tokenizer/"):
        checkpoint_tokenizer(tmp_path)


def test_datasets_are_written_with_a_published_tokenizer(published: Path, tmp_path: Path) -> None:
    documents = list(language_samples())[:20]
    write_dataset(documents, tmp_path / "dataset", published)
    dataset = IndexedDataset(str(tmp_path / "dataset"))
    tokenizer = load_tokenizer(published)
    for document, ids in zip(documents, dataset, strict=True):
        assert ids.tolist() == [*tokenizer.encode(document), tokenizer.eod]
        assert tokenizer.decode(ids.tolist()) == document
