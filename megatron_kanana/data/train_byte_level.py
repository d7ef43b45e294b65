"""Training a byte-level BPE tokenizer with Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

from .special_tokens import CONTROL_TOKENS, TAGS, reserved_tokens

MIN_FREQUENCY = 2  # a pair seen once is no pattern
MAX_TOKEN_BYTES = 48  # 16 characters of Korean, Japanese, Chinese or Thai, as SentencePiece's limit

EAST_ASIAN = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
WORD = "|".join(
    (
        r"[\p{Hangul}\p{M}]+",
        rf"[{EAST_ASIAN}\p{{M}}]+",
        r"[\p{L}\p{M}&&[\p{Thai}]]+",
        rf"[\p{{L}}\p{{M}}&&[^\p{{Hangul}}{EAST_ASIAN}\p{{Thai}}]]+",
    )
)
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        rf"[^\r\n\p{{L}}\p{{M}}\p{{N}}]?(?:{WORD})",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}][^\s\p{L}\p{N}]*[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""What merges never cross: the rules of GPT-4's and Llama 3's tokenizers (contractions, words with
the blank before them, up to three digits, runs of signs, line breaks, blanks but for the last one),
with words cut where Hangul, the Chinese and Japanese scripts, Thai and others meet, so that a Latin
name before a Korean particle has the tokens it has elsewhere. Marks belong to words, without which
Thai and decomposed Vietnamese fall apart."""


def train_byte_level(
    texts: Iterable[str], vocab_size: int, special_slots: int, *, fill: bool = False
) -> Tokenizer:
    """Train a tokenizer whose ids are: 256 bytes, merges, then control tokens, tags, reserved ones.

    Args:
        texts: documents to learn from.
        vocab_size: number of ids, exactly.
        special_slots: ids for tokens with a meaning beyond text; what is not named is reserved.
        fill: reserve also the ids for which the texts have no merges.

    Raises:
        ValueError: the texts do not give that many merges and `fill` is not set.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    wanted = vocab_size - special_slots
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = tokenizer.get_vocab_size()
    if learned < wanted and not fill:
        raise ValueError(
            f"the samples give {learned - 256} merges, {wanted - 256} were asked for: give more"
            f" text, a vocabulary of {learned + special_slots}, or fill it with reserved tokens"
        )
    reserved = vocab_size - learned - len(CONTROL_TOKENS) - len(TAGS)
    tokenizer.add_special_tokens(_added(CONTROL_TOKENS, special=True))
    tokenizer.add_tokens(_added(TAGS, special=False))
    tokenizer.add_special_tokens(_added(reserved_tokens(reserved), special=True))
    return tokenizer


def _added(names: Iterable[str], *, special: bool) -> list[AddedToken]:
    return [AddedToken(name, normalized=False, special=special) for name in names]
