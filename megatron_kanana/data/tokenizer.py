"""SentencePiece tokenizers: training one, and the face that megatron-core's datasets expect."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

END_OF_DOCUMENT = "<|end_of_document|>"
PADDING = "<|padding|>"


class SentencePieceTokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: number of pieces.
        eod: id put after each document.
        pad: id of padding, or -1 where the model has none.
        unique_identifiers: what megatron-core hashes to name index caches.

    Args:
        path: a SentencePiece .model file.

    Raises:
        ValueError: the file is not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model; give a .model file") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        self.pad: int = self._processor.pad_id()
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.unique_identifiers = collections.OrderedDict(
            {"class": type(self).__name__, "sha256": digest}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD."""
        text: str = self._processor.decode(list(ids))
        return text


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: Path, *, max_line_bytes: int = 4096
) -> None:
    """Train a byte-fallback BPE model that round-trips every text exactly.

    Digits are separate pieces, whitespace is kept as it is, and line breaks are pieces of their
    own, so that source code costs few tokens.

    Args:
        texts: documents to learn from.
        vocab_size: pieces, the 256 bytes and 4 control pieces among them.
        path: file to write; its folder must exist.
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
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,
            eos_piece=END_OF_DOCUMENT,
            pad_piece=PADDING,
            num_threads=1,
            minloglevel=2,
        )
