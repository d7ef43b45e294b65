"""Writing a tokenizer as Hugging Face's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_kanana.config.tokenizer_files import HUGGING_FACE_FILES, TOKENIZER_JSON

CHAT_TEMPLATE = Path(__file__).resolve().parent / "chat_template.jinja"
"""Conversation, tools and reasoning as text, for tokenizers that bring no template."""

SPACE = "\u2581"  # what SentencePiece writes for a space

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def save_hugging_face_tokenizer(path: Path, folder: Path) -> None:
    """Write a tokenizer so that transformers' AutoTokenizer loads it from `folder`.

    Of a folder of Hugging Face's files these are copied. A SentencePiece model is translated: every
    text has the same ids, and decodes to the same text. Two things follow Hugging Face's habits:
    names of control pieces in a text are taken for them unless `split_special_tokens=True` is
    given, and of ids whose bytes are not UTF-8 each byte of the run becomes U+FFFD.

    Args:
        path: SentencePiece .model file, or folder with tokenizer.json.
        folder: existing folder to write to; files of the same names are replaced.

    Raises:
        ValueError: the SentencePiece model is of a kind that cannot be translated exactly.
    """
    if path.is_dir():
        for name in HUGGING_FACE_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        return
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    if reason := _untranslatable(model):
        raise ValueError(f"{path} cannot be written as tokenizer.json: {reason}")
    special = {
        f"{role}_token": model.pieces[id].piece
        for role, id in (("eos", model.trainer_spec.eos_id), ("pad", model.trainer_spec.pad_id))
        if id >= 0
    }
    translated = _translate(model)
    translated.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in model.pieces
            if piece.type == _Piece.CONTROL
        ]
    )
    translated.add_tokens(
        [
            AddedToken(piece.piece, normalized=False)
            for piece in model.pieces
            if piece.type == _Piece.USER_DEFINED and len(piece.piece) > 1
        ]
    )
    translated.save(str(folder / TOKENIZER_JSON))
    write_configuration(folder, special)


def write_configuration(folder: Path, special: dict[str, str]) -> None:
    """Write what transformers wants beside tokenizer.json, the chat template with it.

    Args:
        folder: to write to.
        special: names of tokens by role, such as eos_token.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _untranslatable(model: Any) -> str | None:
    """Why the model's segmentation is not that of a BPE of `tokenizers`, or None if it is."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = {piece.piece for piece in model.pieces if piece.type == _Piece.NORMAL}
    tags = [piece.piece for piece in model.pieces if piece.type == _Piece.USER_DEFINED]
    reasons = {
        "it is no BPE model": trainer.model_type != trainer.BPE,
        "it has no byte fallback": not trainer.byte_fallback,
        "it normalises the text": bool(normalizer.precompiled_charsmap)
        or normalizer.remove_extra_whitespaces,
        "it adds a space in front": normalizer.add_dummy_prefix,
        "it does not mark spaces": not normalizer.escape_whitespaces,
        "a user-defined piece holds a space": any(SPACE in tag for tag in tags if len(tag) > 1),
        "it has unused pieces": any(piece.type == _Piece.UNUSED for piece in model.pieces),
        "a piece holds a character that is no piece": not pieces.issuperset("".join(pieces)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _translate(model: Any) -> Tokenizer:
    """The same segmentation as merges, with the same ids."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    normal = [piece for piece in model.pieces if piece.type == _Piece.NORMAL]
    mergeable = [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]
    known = set(mergeable)
    # SentencePiece scores what is merged, `tokenizers` ranks pairs: those of one piece in a row.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in mergeable
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(rf"\A{unknown}\z"), model.trainer_spec.unk_surface),
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    return tokenizer
