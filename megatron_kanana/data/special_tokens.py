"""Tokens with a meaning beyond text: ends, turns of a conversation, tools, thinking, reserved ones.

Their names are those of `chat_template.jinja`. Control tokens are met in rendered conversations
only: in a document their names are text, and they are left out of decoded text. Tags are matched
and decoded wherever they stand, since a reply without its <tool_call> or <think> cannot be read.
"""

from __future__ import annotations

from .tokenizer import END_OF_DOCUMENT, PADDING

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CONTROL_TOKENS = (END_OF_DOCUMENT, PADDING, *ROLE_TOKENS)
TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<think>", "</think>")


def reserved_tokens(count: int) -> tuple[str, ...]:
    """Names of `count` control tokens that nothing uses yet."""
    return tuple(f"<|reserved_{index}|>" for index in range(count))
