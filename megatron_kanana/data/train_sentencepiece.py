"""Training a SentencePiece tokenizer that has the tokens of conversations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .special_tokens import CONTROL_TOKENS, ROLE_TOKENS, TAGS, reserved_tokens
from .tokenizer import train_tokenizer

MAX_LINE_BYTES = 4096

_TOO_FEW_PIECES = re.compile(r"Please set it to a value <= (\d+)")
_TOO_MANY_CHARACTERS = re.compile(r"smaller than required_chars. \d+ vs (\d+)")


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, special_slots: int, path: Path, *, fill: bool = False
) -> None:
    """Train a byte-fallback BPE model with the control tokens and tags of conversations.

    Args:
        texts: documents to learn from; read twice if `fill` has to fill.
        vocab_size: number of pieces, exactly.
        special_slots: of these, pieces with a meaning beyond text; what is not named is reserved.
        path: .model file to write.
        fill: reserve also the pieces that the texts do not give.

    Raises:
        ValueError: the texts do not give that many pieces and `fill` is not set, or have more
            characters than there are pieces.
    """
    reserved = special_slots - len(CONTROL_TOKENS) - len(TAGS)
    try:
        _train(texts, vocab_size, reserved, path)
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        if many := _TOO_MANY_CHARACTERS.search(str(error)):
            raise ValueError(
                f"the samples have more characters than pieces: SentencePiece needs {many[1]}"
                " pieces; give a larger vocabulary, or train with byte-level BPE"
            ) from error
        few = _TOO_FEW_PIECES.search(str(error))
        if few is None:
            raise ValueError(f"SentencePiece cannot learn from the samples: {error}") from error
        if not fill:
            raise ValueError(
                f"the samples give {few[1]} pieces, {vocab_size} were asked for: give more text,"
                " a smaller vocabulary, or fill it with reserved tokens"
            ) from error
        _train(texts, vocab_size, reserved + vocab_size - int(few[1]), path)


def _train(texts: Iterable[str], vocab_size: int, reserved: int, path: Path) -> None:
    train_tokenizer(
        _short_lines(texts),
        vocab_size,
        path,
        control_pieces=[*ROLE_TOKENS, *reserved_tokens(reserved)],
        tags=TAGS,
        max_line_bytes=MAX_LINE_BYTES,
    )


def _short_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut where they are longer than SentencePiece's limit."""
    length = MAX_LINE_BYTES // 4  # characters; UTF-8 has at most four bytes for one
    for text in texts:
        for line in text.splitlines():
            yield from (line[start : start + length] for start in range(0, len(line), length))
