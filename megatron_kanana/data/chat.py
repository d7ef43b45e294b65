"""Conversations: reading them from JSON and rendering them as a tokenizer's chat template says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_kanana.config.saved import TOKENIZER_FOLDER
from megatron_kanana.config.tokenizer_files import read_json
from megatron_kanana.config.wording import one_line

from .export_tokenizer import CHAT_TEMPLATE
from .tokenizer import Tokenizer

Message = dict[str, Any]

_CONTROL_NAME = re.compile(r"<\|[^|<>\s]+\|>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

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
    return [checked_message(message, f"{path}: message {n}") for n, message in enumerate(messages)]


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The tools in a JSON file: a list of schemas, each with the name of a function.

    Raises:
        ValueError: one line that says where the file is wrong.
    """
    tools = _read_list(path, "tool schemas")
    for number, tool in enumerate(tools):
        if tool_function(tool) is None:
            raise ValueError(f"{path}: tool {number} has no function with a name")
    return tools


def tool_function(tool: Any) -> dict[str, Any] | None:
    """The function of a tool's schema or of a call, which may stand alone; None without a name."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    return function


class ChatTemplate:
    """A tokenizer's own chat template, or `chat_template.jinja` where it brings none.

    Attributes:
        names: control tokens that the template or the tokenizer knows by name; in the text of a
            message they would be taken for them.

    Args:
        tokenizer: of the model.

    Raises:
        ValueError: transformers cannot read the tokenizer's files.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import transformers

        self._own: Any = None
        self._default = CHAT_TEMPLATE.read_text(encoding="utf-8")
        if tokenizer.path.is_dir():
            try:
                self._own = transformers.PreTrainedTokenizerFast.from_pretrained(
                    str(tokenizer.path)
                )
            except Exception as error:  # transformers meets some files with errors of any class
                raise ValueError(
                    f"transformers cannot read {tokenizer.path}: {one_line(error)}"
                ) from error
            self._variables: dict[str, Any] = dict(self._own.special_tokens_map)
        else:
            self._variables = {"eos_token": tokenizer.name_of(tokenizer.eod)}
        values = [value for value in self._variables.values() if isinstance(value, str)]
        self.names = frozenset([*values, *_CONTROL_NAME.findall(self._source(None))])

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        *,
        continued: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: the conversation.
            tools: schemas of the functions that may be called.
            thinking: the template's `enable_thinking`; None leaves it undefined.
            continued: whether it goes up to where the assistant's next turn begins.

        Raises:
            ValueError: the template refuses the conversation.
        """
        return self._render(messages, tools, thinking, continued)[0]

    def render_replies(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a whole conversation, and where in it the assistant's replies lie.

        A reply is what the model writes: not the header of its turn, but the token that ends it.

        Returns:
            the text, and first character and the one after the last of each assistant message.

        Raises:
            ValueError: the template refuses the conversation, or one that does not mark replies
                with {% generation %} renders earlier turns otherwise once there are later ones.
        """
        text, replies = self._render(messages, tools, thinking, continued=False)
        if not _GENERATION.search(self._source(tools)):
            replies = [
                self._reply(text, messages[: number + 1], tools, thinking)
                for number, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        return text, replies

    def _reply(
        self,
        text: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        thinking: bool | None,
    ) -> tuple[int, int]:
        """Place of the last message's reply in a text that begins with these messages."""
        before = self.render(messages[:-1], tools, thinking)
        whole = self.render(messages, tools, thinking, continued=False).rstrip()
        if not whole.startswith(before) or not text.startswith(whole):
            raise ValueError(
                "the tokenizer's chat template does not mark replies with {% generation %}, and"
                f" renders message {len(messages) - 1} otherwise when it is answered"
            )
        return len(before), len(whole)

    def _source(self, tools: list[dict[str, Any]] | None) -> str:
        """The template itself."""
        if self._own is None or not self._own.chat_template:
            return self._default
        source: str = self._own.get_chat_template(tools=tools)
        return source

    def _render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        thinking: bool | None,
        continued: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {} if thinking is None else {"enable_thinking": thinking}
        source = self._source(tools)
        try:
            texts, replies = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=source,
                add_generation_prompt=continued,
                return_assistant_tokens_mask=bool(_GENERATION.search(source)),
                **self._variables,
                **options,
            )
        except Exception as error:  # a template is another's program, in a sandbox
            raise ValueError(
                f"the chat template refuses the conversation: {one_line(error)}"
            ) from error
        return texts[0], replies[0] if replies else []


def render_chat(
    tokenizer: Tokenizer,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
) -> str:
    """The text of a conversation, up to where the assistant's next turn begins.

    Args:
        tokenizer: of the model, see `ChatTemplate`.
        messages, tools, thinking: as for `ChatTemplate.render`.

    Raises:
        ValueError: the template refuses the conversation.
    """
    return ChatTemplate(tokenizer).render(messages, tools, thinking)


def add_chat_template(checkpoint: Path) -> None:
    """Put the shipped template beside a checkpoint's Hugging Face tokenizer that brings none.

    The model has then the template with which it was fine-tuned, wherever it is exported to. A
    SentencePiece model gets it when it is exported.
    """
    folder = checkpoint / TOKENIZER_FOLDER
    own = [folder / CHAT_TEMPLATE.name, folder / "chat_template.json"]
    in_configuration = "chat_template" in read_json(folder / "tokenizer_config.json")
    if folder.is_dir() and not in_configuration and not any(path.is_file() for path in own):
        shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)


def _read_list(path: Path, what: str) -> list[dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path} is not a list of {what}")
    return values


def checked_message(message: Message, place: str) -> Message:
    """A message without what is null in it, the arguments of its tool calls as objects.

    Args:
        message: as it was read.
        place: where it was read, for errors.

    Raises:
        ValueError: one line that begins with `place`.
    """
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
    function = tool_function(call)
    if function is None:
        raise ValueError(f"{place}: a tool call has no function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: arguments of {function['name']} are not JSON") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}: arguments of {function['name']} are not an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
