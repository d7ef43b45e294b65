"""Tokenizers: the face that datasets and generation expect, SentencePiece's, and training one."""

from __future__ import annotations

import collections
import hashlib
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_kanana.config.saved import TOKENIZER_FILE, TOKENIZER_FOLDER
from megatron_kanana.config.tokenizer_files import HUGGING_FACE_FILES, open_sentencepiece

END_OF_DOCUMENT = "<|end_of_document|>"
PADDING = "<|padding|>"


class Tokenizer(Protocol):
    """Text to token ids and back, whatever the kind of files.

    Attributes:
        path: the SentencePiece model, or the folder of Hugging Face's files.
        vocab_size: one more than the largest id.
        unused_ids: ids below it that stand for nothing.
        eod: id put after each document.
        pad: id of padding, or -1 where there is none of its own.
        stop_ids: each of these ends generated text; `eod` is among them.
        unique_identifiers: what megatron-core hashes to name index caches.
    """

    path: Path
    vocab_size: int
    unused_ids: list[int]
    eod: int
    pad: int
    stop_ids: frozenset[int]
    unique_identifiers: collections.OrderedDict[str, Any]

    def encode(self, text: str) -> list[int]:
        """Token ids of a document, nothing added; what looks like a special token in it is text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in one call."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued, behind what the tokenizer puts first."""

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, in which special tokens are meant."""

    def name_of(self, token: int) -> str:
        """What the token is called in the tokenizer's files."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; invalid UTF-8 becomes U+FFFD."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a SentencePiece .model file or in a folder of Hugging Face's files.

    Raises:
        ValueError: it is neither.
    """
    if not Path(path).is_dir():
        return SentencePieceTokenizer(path)
    from .hugging_face_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path)


def copy_tokenizer(path: Path, checkpoint: Path) -> None:
    """Put a copy of a tokenizer's files into a checkpoint's folder, where it is looked for.

    Of a folder only the tokenizer's own files are taken, so it may be a whole model's.
    """
    if not path.is_dir():
        shutil.copyfile(path, checkpoint / TOKENIZER_FILE)
        return
    (checkpoint / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    for name in HUGGING_FACE_FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, checkpoint / TOKENIZER_FOLDER / name)


class SentencePieceTokenizer:
    """A SentencePiece model.

    Attributes: those of `Tokenizer`.

    Args:
        path: a SentencePiece .model file.

    Raises:
        ValueError: the file is not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._processor = open_sentencepiece(self.path)
        self.vocab_size: int = self._processor.vocab_size()
        self.unused_ids: list[int] = []
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(f"{path} has no piece that ends a document (eos)")
        self.pad: int = self._processor.pad_id()
        self.stop_ids = frozenset([self.eod])
        ids = range(self.vocab_size)
        try:
            names = [self.name_of(id) for id in ids]
        except UnicodeDecodeError:
            names = []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} is damaged: a piece is not UTF-8")
        control = [name for id, name in enumerate(names) if self._processor.is_control(id)]
        longest_first = sorted(control, key=len, reverse=True)
        self._control_names = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.unique_identifiers = collections.OrderedDict(
            {"class": type(self).__name__, "sha256": digest}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a document, nothing added; what looks like a special token in it is text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in one call, on this thread."""
        ids: list[list[int]] = self._processor.encode(texts, num_threads=1)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued; nothing is put first."""
        return self.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, in which control pieces are meant."""
        ids: list[int] = []
        for place, part in enumerate(self._control_names.split(text)):
            ids += [self._processor.piece_to_id(part)] if place % 2 else self.encode(part)
        return ids

    def name_of(self, token: int) -> str:
        """The piece with this id."""
        name: str = self._processor.id_to_piece(token)
        return name

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control pieces left out; invalid UTF-8 becomes U+FFFD."""
        text: str = self._processor.decode(list(ids))
        return text


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: Path,
    *,
    control_pieces: Sequence[str] = (),
    tags: Sequence[str] = (),
    max_line_bytes: int = 4096,
) -> None:
    """Train a byte-fallback BPE model that round-trips every text exactly.

    Digits are separate pieces, whitespace is kept as it is, and line breaks are pieces of their
    own, so that source code costs few tokens.

    Args:
        texts: documents to learn from.
        vocab_size: pieces, the 256 bytes and the control pieces among them.
        path: file to write; its folder must exist.
        control_pieces: more pieces that no text has, besides the ends of texts and padding.
        tags: texts that are always one piece.
        max_line_bytes: longer lines are left out of the training.
    """
    lines = (
        line
        for text in texts
        for line in text.splitlines()
        if line and len(line.encode()) <= max_line_bytes
    )
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=max_line_bytes,
            control_symbols=list(control_pieces),
            user_defined_symbols=["\n", "\t", *tags],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,
            eos_piece=END_OF_DOCUMENT,
            pad_piece=PADDING,
            num_threads=1,
            minloglevel=2,
        )
