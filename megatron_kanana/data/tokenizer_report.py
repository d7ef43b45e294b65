"""How many tokens a tokenizer needs for text of each language."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .tokenizer import Tokenizer

HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc]")
"""Syllables, and the letters that they are made of."""

BATCH = 256


@dataclass(frozen=True)
class Measurement:
    """One tokenizer on the text of one language.

    Attributes:
        tokenizer: its name.
        language: its name.
        tokens: of all documents, without the end-of-document tokens.
        words: what whitespace separates; in Japanese, Chinese and Thai that is a phrase or more.
        characters: Unicode code points.
        num_bytes: of the UTF-8 text.
        exact: whether every document decodes to itself.
    """

    tokenizer: str
    language: str
    tokens: int
    words: int
    characters: int
    num_bytes: int
    exact: bool

    @property
    def tokens_per_word(self) -> float:
        """Also called fertility."""
        return self.tokens / self.words

    @property
    def tokens_per_character(self) -> float:
        """Of code points."""
        return self.tokens / self.characters

    @property
    def tokens_per_byte(self) -> float:
        """Of the UTF-8 text."""
        return self.tokens / self.num_bytes


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's ids stand for.

    Attributes:
        tokenizer: its name.
        size: ids that stand for something.
        hangul: of these, how many hold a Hangul character; parts of one do not count.
    """

    tokenizer: str
    size: int
    hangul: int


def measure(
    name: str, tokenizer: Tokenizer, language: str, documents: Iterable[str]
) -> Measurement:
    """Count what a tokenizer makes of documents.

    Raises:
        ValueError: the documents hold no word.
    """
    tokens = words = characters = num_bytes = 0
    exact = True
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch(batch)
        tokens += sum(map(len, encoded))
        words += sum(len(text.split()) for text in batch)
        characters += sum(map(len, batch))
        num_bytes += sum(len(text.encode()) for text in batch)
        exact = exact and [*map(tokenizer.decode, encoded)] == batch
    if not words:
        raise ValueError(f"the text for {language} holds no word")
    return Measurement(name, language, tokens, words, characters, num_bytes, exact)


def count_vocabulary(name: str, tokenizer: Tokenizer) -> Vocabulary:
    """Count a tokenizer's ids, and those that hold Hangul."""
    ids = sorted(set(range(tokenizer.vocab_size)).difference(tokenizer.unused_ids))
    hangul = sum(1 for id in ids if HANGUL.search(tokenizer.decode([id])))
    return Vocabulary(name, len(ids), hangul)


def saving(measured: Measurement, baseline: Measurement) -> float:
    """Share of the baseline's tokens that are not needed; below 0 if more are."""
    return 1 - measured.tokens / baseline.tokens


def baselines(measurements: Sequence[Measurement], baseline: str) -> Mapping[str, Measurement]:
    """The baseline tokenizer's measurement of each language."""
    return {each.language: each for each in measurements if each.tokenizer == baseline}


def as_table(
    measurements: Sequence[Measurement], vocabularies: Sequence[Vocabulary], baseline: str
) -> list[str]:
    """Both as Markdown tables, each language's tokenizers beside the baseline."""
    of = baselines(measurements, baseline)
    lines = [
        "| language | tokenizer | tokens | a word | a character | a byte"
        f" | fewer than {baseline} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {each.language} | {each.tokenizer} | {each.tokens:,} | {each.tokens_per_word:.2f}"
        f" | {each.tokens_per_character:.3f} | {each.tokens_per_byte:.3f}"
        f" | {100 * saving(each, of[each.language]):.1f} % |"
        for each in measurements
    ]
    lines += [
        "",
        "| tokenizer | vocabulary | with Hangul | share |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {each.tokenizer} | {each.size:,} | {each.hangul:,}"
        f" | {100 * each.hangul / each.size:.1f} % |"
        for each in vocabularies
    ]
    return lines


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch
