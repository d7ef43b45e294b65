"""Looking at a tokenizer's files: SentencePiece .model files and Hugging Face folders.

Used by the checks of settings and by `data`; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from .wording import one_line

TOKENIZER_JSON = "tokenizer.json"
HUGGING_FACE_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files of a model's folder that say how text becomes tokens and when a text ends."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning beyond text.

    Attributes:
        eod: put after each document.
        pad: of padding, or -1 where there is none of its own.
        stops: any of these ends generated text: `eod`, and the ends of a turn in a conversation.
    """

    eod: int
    pad: int
    stops: frozenset[int]


def open_sentencepiece(path: Path) -> Any:
    """The SentencePiece processor of a .model file.

    Raises:
        ValueError: the file is not one.
    """
    if not path.is_file():  # reading from a pipe or a device would not end
        raise ValueError(f"{path} is not a file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a SentencePiece model") from error


def open_hugging_face(folder: Path) -> tuple[tokenizers.Tokenizer, SpecialIds]:
    """The tokenizer in a folder of Hugging Face's files, and its special ids.

    Document ends are those of generation_config.json (the first, if it names several), else the
    eos_token of tokenizer_config.json or special_tokens_map.json.

    Raises:
        ValueError: the folder holds no tokenizer, or it does not say how a text ends.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        raise ValueError(f"{folder} has no {TOKENIZER_JSON}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        tokenizer.encode("A text, 1.\n")  # some files fail when they are used
    except BaseException as error:  # the library raises no narrower class, and Rust's panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = one_line(error)
        raise ValueError(f"{folder / TOKENIZER_JSON} cannot be read: {reason}") from error
    return tokenizer, _special_ids(folder, tokenizer)


def sentencepiece_size(path: Path) -> int:
    """Pieces of a SentencePiece model.

    Raises:
        ValueError: the file is not one.
    """
    return int(open_sentencepiece(path).vocab_size())


def hugging_face_size(folder: Path) -> int:
    """One more than the largest id of the tokenizer in a folder of Hugging Face's files.

    Raises:
        ValueError: as `open_hugging_face`.
    """
    tokenizer, _ = open_hugging_face(folder)
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def _special_ids(folder: Path, tokenizer: tokenizers.Tokenizer) -> SpecialIds:
    def named(token: str) -> int | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = read_json(folder / file).get(token)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                return tokenizer.token_to_id(content)
        return None

    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    eos, pad = named("eos_token"), named("pad_token")
    stops = [*listed, *([] if eos is None else [eos])]
    if not stops:
        raise ValueError(f"{folder} names no end of a text; add eos_token to tokenizer_config.json")
    if any(type(end) is not int or end not in range(2**32) for end in stops) or any(
        tokenizer.id_to_token(end) is None for end in stops
    ):
        raise ValueError(
            f"{folder / 'generation_config.json'} ends texts with unknown ids: {stops}"
        )
    own_pad = pad is not None and pad not in stops
    return SpecialIds(stops[0], pad if own_pad and pad is not None else -1, frozenset(stops))
