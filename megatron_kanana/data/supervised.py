"""A conversation as tokens, and which of them are learnt: those the assistant writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_kanana.config.chat_settings import ChatSettings

from .chat import ChatTemplate, Message
from .conversations import Conversation
from .tokenizer import Tokenizer


class TooLongError(ValueError):
    """A conversation does not fit into a sample."""


@dataclass(frozen=True)
class Example:
    """A conversation to learn from.

    Attributes:
        tokens: ids of the whole conversation.
        trained: for each token whether predicting it is learnt.
        truncated: whether its end was cut off.
    """

    tokens: list[int]
    trained: list[bool]
    truncated: bool = False


class ConversationEncoder:
    """Conversations to examples, as the chat template renders them.

    Learnt are the assistant's replies with the token that ends each; not the headers of its turns,
    and nothing of users, systems and tools. Text is cut into tokens where a reply begins and ends,
    as it is when the model writes one.

    Args:
        tokenizer: of the model.
        settings: what is learnt of a conversation, and what becomes of a too long one.
        max_tokens: predictions that fit into a sample.
    """

    def __init__(self, tokenizer: Tokenizer, settings: ChatSettings, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_tokens = max_tokens
        self._template = ChatTemplate(tokenizer)

    def encode(self, conversation: Conversation) -> Example:
        """The conversation as an example.

        Raises:
            TooLongError: it does not fit and is not to be cut.
            ValueError: it cannot be rendered, or nothing of it is learnt.
        """
        messages = conversation.messages
        self._check_names(messages)
        if self._settings.reasoning == "drop":
            messages = [without_reasoning(message) for message in messages]
        thinking = conversation.thinking
        if thinking is None:
            thinking = self._settings.enable_thinking
        text, replies = self._template.render_replies(messages, conversation.tools, thinking)
        learnt = dict(zip(replies, self._learnt(messages), strict=True))
        tokens: list[int] = []
        trained: list[bool] = []
        for part, is_learnt in _parts(text, learnt):
            ids = self._tokenizer.encode_chat(part)
            tokens += ids
            trained += [is_learnt] * len(ids)
        truncated = len(tokens) - 1 > self._max_tokens
        if truncated and self._settings.too_long != "truncate":
            raise TooLongError(
                f"{len(tokens) - 1} predictions are more than data.sequence_length ="
                f" {self._max_tokens}"
            )
        tokens, trained = tokens[: self._max_tokens + 1], trained[: self._max_tokens + 1]
        if not any(trained[1:]):
            where = f" in its first {self._max_tokens} tokens" if truncated else ""
            raise ValueError(f"nothing the assistant writes{where} is to be learnt")
        return Example(tokens, trained, truncated)

    def _learnt(self, messages: list[Message]) -> Iterator[bool]:
        """For each assistant message whether it is learnt."""
        last_user = max(
            (n for n, message in enumerate(messages) if message["role"] == "user"), default=-1
        )
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                yield self._settings.train_on == "all_replies" or number > last_user

    def _check_names(self, messages: list[Message]) -> None:
        """In a message, the name of a control token would end a turn or begin one."""
        for number, message in enumerate(messages):
            content = json.dumps(message, ensure_ascii=False)
            found = [name for name in self._template.names if name in content]
            if found:
                raise ValueError(f"message {number} holds the control token {min(found)}")


def without_reasoning(message: Message) -> Message:
    """A message without the assistant's reasoning, wherever it stands."""
    message = {
        key: value
        for key, value in message.items()
        if key not in ("reasoning_content", "reasoning", "thinking")
    }
    content: Any = message.get("content")
    if message["role"] == "assistant" and isinstance(content, str) and "</think>" in content:
        message["content"] = content.split("</think>")[-1].lstrip("\n")
    return message


def _parts(text: str, learnt: dict[tuple[int, int], bool]) -> Iterator[tuple[str, bool]]:
    """The text cut at the replies' ends, and of each part whether it is learnt."""
    end = 0
    for (start, stop), is_learnt in learnt.items():
        yield text[end:start], False
        yield text[start:stop], is_learnt
        end = stop
    yield text[end:], False
