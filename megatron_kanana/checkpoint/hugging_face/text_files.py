"""What belongs to a model beside its weights: tokenizer, chat template, how generation ends."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megatron_kanana.config.saved import TOKENIZER_FILE, checkpoint_tokenizer
from megatron_kanana.config.tokenizer_files import TOKENIZER_JSON
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from megatron_kanana.data.tokenizer import copy_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG_FILE = "generation_config.json"


def keep_text_files(folder: Path, checkpoint: Path) -> None:
    """Copy a Hugging Face folder's tokenizer into a checkpoint, where its tools look for it."""
    path = folder if (folder / TOKENIZER_JSON).is_file() else folder / TOKENIZER_FILE
    try:
        load_tokenizer(path)
    except ValueError as error:
        logger.info("no tokenizer is taken (%s): name one with data.tokenizer", error)
        return
    copy_tokenizer(path, checkpoint)


def write_text_files(checkpoint: Path, folder: Path) -> int | None:
    """Write a checkpoint's tokenizer into a Hugging Face folder, and how generation ends.

    Returns:
        the token that ends a document, or None if the checkpoint has no tokenizer that
        transformers could load.
    """
    try:
        path = checkpoint_tokenizer(checkpoint)
        save_hugging_face_tokenizer(path, folder)
    except (FileNotFoundError, ValueError) as error:
        logger.info("no tokenizer is written: %s", error)
        return None
    end_of_text = load_tokenizer(path).eod
    generation = folder / GENERATION_CONFIG_FILE
    if not generation.is_file():
        content = {"eos_token_id": end_of_text, "do_sample": True}
        generation.write_text(json.dumps(content, indent=2) + "\n")
    return end_of_text
