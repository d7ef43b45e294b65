"""Settings of supervised fine-tuning: what is learnt of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting


@dataclass(kw_only=True)
class ChatSettings:
    """How conversations become samples."""

    too_long: str = setting(
        "drop",
        help="what becomes of a conversation that is longer than a sample: it is left out and"
        " listed with the rejected ones, its end is cut off, or the run does not start",
        choices=("drop", "truncate", "error"),
    )
    max_rejected_percent: float = setting(
        5.0,
        help="share of the conversations that may be unusable; with more the run does not start",
        minimum=0.0,
        maximum=100.0,
    )
    train_on: str = setting(
        "all_replies",
        help="which of the assistant's messages are learnt; last_reply is those after the last user"
        " message, the only ones in which the shipped template keeps reasoning",
        choices=("all_replies", "last_reply"),
    )
    reasoning: str = setting(
        "train",
        help="whether the assistant's reasoning is learnt, or dropped before rendering",
        choices=("train", "drop"),
    )
    enable_thinking: bool | None = setting(
        None,
        help="the chat template's enable_thinking for records that have none of their own; null"
        " leaves it undefined",
    )
    workers: int = setting(
        0, help="processes that render and tokenize conversations; 0 is the main one", minimum=0
    )
