"""Conversations: reading them from JSON and rendering them as a tokenizer's chat template says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .export_tokenizer import CHAT_TEMPLATE
from .tokenizer import Tokenizer

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(path: Path) -> list[Message]:
    """The conversation in a JSON file: a list of messages as in OpenAI's and Hugging Face's APIs.

    Arguments of tool calls may be objects or, as OpenAI gives them, JSON text; they become objects.

    Raises:
        ValueError: one line that says where the file is wrong.
    """
    messages = _read_list(path, "messages")
    if not messages:
        raise ValueError(f"{path}: the conversation is empty")
    return [_checked_message(message, f"{path}: message {n}") for n, message in enumerate(messages)]


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The tools in a JSON file: a list of schemas, each with the name of a function.

    Raises:
        ValueError: one line that says where the file is wrong.
    """
    tools = _read_list(path, "tool schemas")
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{path}: tool {number} has no function with a name")
    return tools


def render_chat(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
) -> str:
    """The text of a conversation, up to where the assistant's next turn begins.

    Args:
        tokenizer: its own chat template is used, or, without one, `chat_template.jinja`.
        messages: the conversation.
        tools: schemas of the functions that may be called.
        thinking: the template's `enable_thinking`; None leaves it undefined.

    Raises:
        ValueError: the template refuses the conversation.
    """
    import jinja2
    import transformers

    variables: dict[str, Any] = {"add_generation_prompt": True}
    if thinking is not None:
        variables["enable_thinking"] = thinking
    default = CHAT_TEMPLATE.read_text(encoding="utf-8")
    try:
        if tokenizer.path.is_dir():
            full = transformers.PreTrainedTokenizerFast.from_pretrained(str(tokenizer.path))
            text: str = full.apply_chat_template(
                messages,
                tools=tools,
                chat_template=None if full.chat_template else default,
                tokenize=False,
                **variables,
            )
            return text
        from transformers.utils.chat_template_utils import render_jinja_template

        variables["eos_token"] = tokenizer.name_of(tokenizer.eod)
        (text,), _ = render_jinja_template(
            [messages], tools=tools, chat_template=default, **variables
        )
        return text
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def _read_list(path: Path, what: str) -> list[dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path} is not a list of {what}")
    return values


def _checked_message(message: Message, place: str) -> Message:
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") not in ROLES:
        raise ValueError(f"{place}: role {message.get('role')!r} is none of {', '.join(ROLES)}")
    calls = message.get("tool_calls", [])
    if "content" not in message and not calls:
        raise ValueError(f"{place} has neither content nor tool_calls")
    if not isinstance(message.get("content", ""), str | list):
        raise ValueError(f"{place}: content is neither text nor a list of parts")
    if not isinstance(calls, list):
        raise ValueError(f"{place}: tool_calls is not a list")
    if calls:
        message["tool_calls"] = [_checked_call(call, place) for call in calls]
    return message


def _checked_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: a tool call has no function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"{place}: arguments of {function['name']} are not JSON") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}: arguments of {function['name']} are not an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
