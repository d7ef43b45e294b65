"""Conversations of a run: made ready by one process, read by all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_kanana.config import ConfigurationError, Problem, Settings
from megatron_kanana.data.conversation_store import (
    ConversationStore,
    Summary,
    prepare_conversations,
)
from megatron_kanana.data.packed_conversations import HeldOutConversations, PackedConversations
from megatron_kanana.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def conversation_datasets(
    settings: Settings, tokenizer: Tokenizer, total: int
) -> tuple[PackedConversations, HeldOutConversations | None]:
    """Training samples of the whole run, and those of an evaluation; every process must call this.

    Args:
        settings: of the run.
        tokenizer: of the model.
        total: training samples of the run.

    Raises:
        ConfigurationError: on every process; the conversations cannot be used as the settings ask.
    """
    data, schedule = settings.data, settings.schedule
    store = _prepared("data.conversations", settings, tokenizer)
    count = len(store)
    held_out_store = store
    if data.held_out_conversations:
        held_out_store = _prepared("data.held_out_conversations", settings, tokenizer)
        training, held_out = range(count), range(len(held_out_store))
    else:
        first = round(count * (100 - data.held_out_percent) / 100)
        training, held_out = range(first), range(first, count)
    padding = tokenizer.pad if tokenizer.pad >= 0 else tokenizer.eod
    if not training:
        raise _error("data.conversations", f"of {count} usable conversations none is for training")
    train = PackedConversations(
        store, training, data.sequence_length, settings.seed, padding, total
    )
    logger.info(
        "%d conversations to train on fill %d samples of %d tokens to %.1f %%; a pass is %.1f"
        " steps",
        len(training),
        train.samples_per_pass,
        data.sequence_length,
        100 * train.filled,
        train.samples_per_pass / schedule.global_batch_size,
    )
    if not schedule.evaluation_interval:
        return train, None
    if not held_out:
        raise _error(
            "data.held_out_percent", f"of {count} usable conversations none is for evaluation"
        )
    evaluation = HeldOutConversations(
        held_out_store,
        held_out,
        data.sequence_length,
        settings.seed,
        padding,
        schedule.evaluation_batches * schedule.global_batch_size,
    )
    if evaluation.samples_per_pass > len(evaluation):
        logger.info(
            "an evaluation takes %d of the %d held-out samples (schedule.evaluation_batches)",
            len(evaluation),
            evaluation.samples_per_pass,
        )
    return train, evaluation


def _prepared(setting: str, settings: Settings, tokenizer: Tokenizer) -> ConversationStore:
    """The store of the files that a setting names; the first process makes it, the others wait."""
    data = settings.data
    files: Sequence[str] = getattr(data, setting.removeprefix("data."))
    outcome: list[tuple[Path | None, str]] = [(None, "")]
    if dist.get_rank() == 0:
        try:
            folder = prepare_conversations(
                [Path(file) for file in files],
                tokenizer,
                data.chat,
                data.sequence_length,
                Path(data.cache_dir),
            )
            outcome = [(folder, "")]
        except (OSError, ValueError) as error:
            outcome = [(None, str(error))]
    dist.broadcast_object_list(outcome, src=0)
    folder_or_none, reason = outcome[0]
    if folder_or_none is None:
        raise _error(setting, reason)
    store = ConversationStore(folder_or_none)
    _tell(setting, store)
    _check(setting, store, settings)
    return store


def _tell(setting: str, store: ConversationStore) -> None:
    summary = store.summary
    logger.info(
        "%s: %d records, %d cannot be used (%d of them too long), %d cut; %d tokens, %d learnt",
        setting,
        summary.records,
        summary.rejected,
        summary.too_long,
        summary.truncated,
        summary.tokens,
        summary.trained_tokens,
    )
    for reason in summary.reasons:
        logger.warning("rejected: %s", reason)
    if summary.rejected:
        logger.warning("all %d rejected records: %s", summary.rejected, store.rejected_path)


def _check(setting: str, store: ConversationStore, settings: Settings) -> None:
    """Not more is rejected than the settings allow."""
    chat, summary = settings.data.chat, store.summary
    if summary.too_long and chat.too_long == "error":
        raise _error(
            "data.chat.too_long",
            f"{summary.too_long} conversations of {setting} are longer than data.sequence_length ="
            f" {settings.data.sequence_length}{_examples(summary, store)}",
        )
    others = summary.rejected - summary.too_long
    share = 100 * others / max(1, summary.records)
    if share > chat.max_rejected_percent:
        raise _error(
            setting,
            f"{others} of {summary.records} conversations cannot be used, more than"
            f" data.chat.max_rejected_percent = {chat.max_rejected_percent}"
            f"{_examples(summary, store)}",
        )


def _examples(summary: Summary, store: ConversationStore) -> str:
    lines = "".join(f"\n        {reason}" for reason in summary.reasons)
    return f":{lines}\n      all of them: {store.rejected_path}"


def _error(setting: str, reason: str) -> ConfigurationError:
    remedy = "mend the files, or change the settings under data (docs/fine_tuning.md)"
    return ConfigurationError([Problem(setting, "as given", reason, remedy)])
