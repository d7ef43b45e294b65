"""Training a tokenizer of either kind and writing the folder that holds it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_kanana.config.saved import TOKENIZER_FILE
from megatron_kanana.config.tokenizer_files import TOKENIZER_JSON

from .export_tokenizer import save_hugging_face_tokenizer, write_configuration
from .special_tokens import CONTROL_TOKENS, TAGS
from .text_samples import WeightedSample
from .tokenizer import END_OF_DOCUMENT, PADDING, load_tokenizer
from .train_byte_level import train_byte_level
from .train_sentencepiece import train_sentencepiece
from .whole_folder import whole_folder

KINDS = ("byte-level", "sentencepiece")
NAMED_TOKENS = len(CONTROL_TOKENS) + len(TAGS)
TRAINING_FILE = "training.json"
"""In a trained tokenizer's folder: what it was trained on."""


@dataclass(frozen=True)
class TokenizerShape:
    """What kind of tokenizer to train.

    Attributes:
        kind: one of `KINDS`.
        vocab_size: ids, exactly.
        special_slots: of these, ids with a meaning beyond text; those without a name are reserved.
        fill: reserve more if the text gives too few tokens, instead of refusing.

    Raises:
        ValueError: the sizes leave no room.
    """

    kind: str = "byte-level"
    vocab_size: int = 128256
    special_slots: int = 256
    fill: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is none of {', '.join(KINDS)}")
        if self.special_slots < NAMED_TOKENS:
            raise ValueError(
                f"{self.special_slots} special slots are fewer than the {NAMED_TOKENS} named tokens"
            )
        if self.vocab_size <= 256 + self.special_slots:
            raise ValueError(
                f"a vocabulary of {self.vocab_size} has no room beside 256 bytes and"
                f" {self.special_slots} special slots"
            )


def train_tokenizer_folder(sample: WeightedSample, shape: TokenizerShape, folder: Path) -> None:
    """Train and write `folder`, which appears only when it is whole and replaces an earlier one.

    It holds Hugging Face's files with the chat template and generation_config.json, of a
    SentencePiece tokenizer its .model file too, and `TRAINING_FILE`.

    Raises:
        ValueError: as the trainers do; nothing is written then.
    """
    with whole_folder(folder) as partial:
        _train(sample, shape, partial)
        _write_generation_config(partial)
        _write_training_record(sample, shape, partial)
        if folder.exists():
            shutil.rmtree(folder)


def _train(texts: Iterable[str], shape: TokenizerShape, folder: Path) -> None:
    if shape.kind == "sentencepiece":
        model = folder / TOKENIZER_FILE
        train_sentencepiece(texts, shape.vocab_size, shape.special_slots, model, fill=shape.fill)
        save_hugging_face_tokenizer(model, folder)
        return
    tokenizer = train_byte_level(texts, shape.vocab_size, shape.special_slots, fill=shape.fill)
    tokenizer.save(str(folder / TOKENIZER_JSON))
    write_configuration(folder, {"eos_token": END_OF_DOCUMENT, "pad_token": PADDING})


def _write_generation_config(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    values = {"eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n")


def _write_training_record(sample: WeightedSample, shape: TokenizerShape, folder: Path) -> None:
    sources = [
        {
            "language": source.language,
            "path": str(source.path),
            "weight": source.weight,
            "available_bytes": share.available,
            "sampled_bytes": share.num_bytes,
        }
        for source, share in zip(sample.sources, sample.shares, strict=True)
    ]
    values = {**dataclasses.asdict(shape), "seed": sample.seed, "sources": sources}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / TRAINING_FILE).write_text(text, encoding="utf-8")
