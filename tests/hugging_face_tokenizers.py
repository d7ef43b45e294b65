"""A small tokenizer of the kind published models have: byte-level BPE, tokens for turns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END_OF_TEXT, END_OF_TURN = "<|begin|>", "<|end_of_text|>", "<|end_of_turn|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' ~ message.role ~ ']' ~ message.content ~ '<|end_of_turn|>' }}"
    "{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)


def save_byte_level_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Write tokenizer.json, its configuration, a chat template and a generation configuration."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in (BEGIN, END_OF_TEXT, END_OF_TURN)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin, end_of_text, end_of_turn = (
        tokenizer.token_to_id(name) for name in (BEGIN, END_OF_TEXT, END_OF_TURN)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TURN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [end_of_text, end_of_turn]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "model.safetensors").write_text("weights, which are no part of the tokenizer")
