"""Hugging Face tokenizers: a folder with tokenizer.json and the files beside it."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron_kanana.config.tokenizer_files import HUGGING_FACE_FILES, open_hugging_face


class HuggingFaceTokenizer:
    """Text to token ids and back, by the light `tokenizers` library.

    Attributes: those of `tokenizer.Tokenizer`.

    Args:
        path: folder with tokenizer.json and tokenizer_config.json.

    Raises:
        ValueError: the folder holds no tokenizer, or it does not say how a text ends.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tokenizer, special = open_hugging_face(self.path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eod, self.pad, self.stop_ids = special.eod, special.pad, special.stops
        used = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(used) + 1
        self.unused_ids: list[int] = sorted(set(range(self.vocab_size)).difference(used))
        digest = hashlib.sha256()
        for name in HUGGING_FACE_FILES:
            if (self.path / name).is_file():
                digest.update((self.path / name).read_bytes())
        self.unique_identifiers = collections.OrderedDict(
            {"class": type(self).__name__, "sha256": digest.hexdigest()}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a document; what looks like a special token in it is text."""
        self._tokenizer.encode_special_tokens = True
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in one call."""
        self._tokenizer.encode_special_tokens = True
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued, behind what the tokenizer puts first."""
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, in which special tokens are meant."""
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def name_of(self, token: int) -> str:
        """The token with this id; KeyError if there is none."""
        name = self._tokenizer.id_to_token(token)
        if name is None:
            raise KeyError(token)
        return name

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; invalid UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
