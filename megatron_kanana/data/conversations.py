"""Conversations to learn from: reading Hugging Face's chat files, and checking every record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kanana.config.wording import one_line

from .chat import Message, checked_message, tool_function


@dataclass(frozen=True)
class Conversation:
    """One record.

    Attributes:
        messages: checked; arguments of tool calls are objects.
        tools: schemas of the functions that may be called, or None.
        thinking: the record's `enable_thinking`; None where it has none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking: bool | None


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Records of a file as JSON, none parsed yet, with the number of their line or row, from 1.

    Args:
        path: .jsonl, one record a line, blank lines being none; or .parquet, one a row.

    Raises:
        ValueError: the file's kind is unknown, or it is no such file.
    """
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    elif path.suffix == ".parquet":
        yield from _rows(path)
    else:
        raise ValueError(f"{path}: conversations are read from .jsonl and .parquet files")


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path} is no parquet file: {one_line(error)}") from error
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, json.dumps(_without_nulls(row), ensure_ascii=False).encode()
    except (OSError, pyarrow.ArrowException, UnicodeError) as error:
        raise ValueError(
            f"{path} is damaged after row {number} ({one_line(error)}); repair it or leave it out"
        ) from error


def _without_nulls(value: Any) -> Any:
    """A table's rows have every field of any other row, null where there was none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_conversation(record: bytes) -> Conversation:
    """The conversation of a record: an object with `messages`, perhaps `tools`, `enable_thinking`.

    Raises:
        ValueError: what is wrong with it, in one line.
    """
    values = _parsed(record)
    if "messages" not in values:
        others = ", ".join(values) or "nothing"
        raise ValueError(f"there are no messages, but {others}")
    messages = values["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError("messages is not a list of messages")
    if not messages:
        raise ValueError("the conversation is empty")
    messages = [checked_message(each, f"message {n}") for n, each in enumerate(messages)]
    thinking = values.get("enable_thinking")
    if not isinstance(thinking, bool | None):
        raise ValueError(f"enable_thinking is neither true nor false, but {thinking!r}")
    tools = _tools(values.get("tools"))
    _check_turns(messages)
    _check_calls(messages, {name: tool_function(tool) or {} for name, tool in tools.items()})
    return Conversation(messages, list(tools.values()) or None, thinking)


def _parsed(record: bytes) -> dict[str, Any]:
    try:
        values = json.loads(record.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the line is no JSON object, but {type(values).__name__}")
    return values


def _tools(tools: Any) -> dict[str, Any]:
    """Schemas by the name of their function; some datasets keep the list as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools is text, but not JSON: {one_line(error)}") from error
    if not isinstance(tools, list | None):
        raise ValueError("tools is not a list of schemas")
    by_name: dict[str, Any] = {}
    for number, tool in enumerate(tools or []):
        function = tool_function(tool)
        if function is None:
            raise ValueError(f"tool {number} has no function with a name")
        if function["name"] in by_name:
            raise ValueError(f"two tools are called {function['name']}")
        by_name[function["name"]] = tool
    return by_name


def _check_turns(messages: list[Message]) -> None:
    """Who may speak after whom, and that there is a reply to learn from."""
    allowed = {
        None: ("system", "developer", "user"),
        "system": ("system", "developer", "user", "assistant"),
        "developer": ("system", "developer", "user", "assistant"),
        "user": ("system", "developer", "user", "assistant"),
        "assistant": ("system", "developer", "user"),
        "assistant that calls a tool": ("tool",),
        "tool": ("tool", "assistant"),
    }
    before: str | None = None
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in allowed[before]:
            place = "begins the conversation" if before is None else f"follows {before}"
            wanted = " or ".join(allowed[before])
            raise ValueError(f"message {number}: {role} {place}, where {wanted} would")
        before = "assistant that calls a tool" if message.get("tool_calls") else role
        if role == "assistant" and not _says_something(message):
            raise ValueError(f"message {number}: the assistant says nothing")
        if role != "assistant" and message.get("tool_calls"):
            raise ValueError(f"message {number}: {role} calls a tool")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant message to learn from")


def _says_something(message: Message) -> bool:
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return bool(content.strip() or message.get("tool_calls"))


def _check_calls(messages: list[Message], functions: dict[str, dict[str, Any]]) -> None:
    """Calls are of the tools there are, with the arguments they need; results answer a call."""
    open_calls: set[str] = set()
    for number, message in enumerate(messages):
        for call in message.get("tool_calls", []):
            function = call.get("function", call)
            name, arguments = function["name"], function["arguments"]
            if not functions:
                raise ValueError(f"message {number} calls {name}, but the record has no tools")
            if name not in functions:
                raise ValueError(
                    f"message {number} calls {name}, which is none of its tools:"
                    f" {', '.join(functions)}"
                )
            parameters = functions[name].get("parameters") or {}
            missing = [each for each in parameters.get("required", []) if each not in arguments]
            if missing:
                raise ValueError(
                    f"message {number} calls {name} without {', '.join(missing)}, which its schema"
                    " requires"
                )
        if message["role"] == "assistant":
            open_calls = {call["id"] for call in message.get("tool_calls", []) if "id" in call}
        answered = message.get("tool_call_id")
        if message["role"] == "tool" and open_calls and answered not in {None, *open_calls}:
            raise ValueError(f"message {number} answers call {answered!r}, which was not made")
