"""Conversations as text: the shipped template, token by token, and a tokenizer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_kanana.data.builtin import BuiltinData
from megatron_kanana.data.chat import (
    add_chat_template,
    read_messages,
    read_tools,
    render_chat,
)
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer
from tests.hugging_face_tokenizers import save_byte_level_tokenizer

END = "<|end_of_document|>"
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "서울 날씨?"}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "Ask the tool.\n",
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "서울", "days": 1}'},
        },
        {"id": "2", "type": "function", "function": {"name": "time", "arguments": {}}},
    ],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": '{"celsius": -3}'}
ANSWER = {"role": "assistant", "content": "<think>\nMinus.\n</think>\n\n영하 3도."}
THANKS = {
    "role": "user",
    "content": [{"type": "text", "text": "고마"}, {"type": "text", "text": "워"}],
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "날씨", "parameters": {}},
}

CALLS = (
    '<tool_call>{"name": "weather", "arguments": {"city": "서울", "days": 1}}</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
)


@pytest.fixture
def tokenizer(builtin: BuiltinData) -> Tokenizer:
    """The built-in tokenizer, which brings no template."""
    return load_tokenizer(builtin.tokenizer)


def written(folder: Path, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages as they come back from a file."""
    (folder / "chat.json").write_text(json.dumps(messages))
    return read_messages(folder / "chat.json")


def assert_rendered(tokenizer: Tokenizer, text: str, expected: str) -> None:
    """The same text, the same tokens, and each end of a turn one token."""
    assert text == expected
    ids = tokenizer.encode_chat(text)
    assert ids.count(tokenizer.eod) == expected.count(END)
    parts = [tokenizer.encode(part) for part in expected.split(END)]
    assert ids == [id for part in parts for id in [*part, tokenizer.eod]][:-1]


def test_a_plain_question(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = render_chat(tokenizer, written(tmp_path, QUESTION))
    assert_rendered(tokenizer, text, f"<|user|>\n서울 날씨?{END}\n<|assistant|>\n")


def test_tools_calls_results_and_reasoning_under_way(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = written(tmp_path, SYSTEM, QUESTION, CALL, RESULT)
    text = render_chat(tokenizer, messages, [WEATHER], thinking=True)
    schema = '{"type": "function", "function": '
    schema += '{"name": "weather", "description": "날씨", "parameters": {}}}'
    expected = (
        "<|system|>\nBe brief.\n\n# Tools\n\n"
        f"You may call these functions, one JSON schema a line:\n<tools>\n{schema}\n</tools>\n\n"
        "To call one, write its name and its arguments as one JSON object:\n"
        '<tool_call>{"name": <function name>, "arguments": <arguments>}</tool_call>'
        f"{END}\n<|user|>\n서울 날씨?{END}\n"
        f"<|assistant|>\n<think>\nAsk the tool.\n</think>\n\n{CALLS}{END}\n"
        f'<|tool|>\n{{"celsius": -3}}{END}\n<|assistant|>\n'
    )
    assert_rendered(tokenizer, text, expected)


def test_reasoning_goes_once_the_user_has_spoken_again(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    messages = written(tmp_path, QUESTION, CALL, RESULT, ANSWER, THANKS)
    expected = (
        f"<|user|>\n서울 날씨?{END}\n<|assistant|>\n{CALLS}{END}\n"
        f'<|tool|>\n{{"celsius": -3}}{END}\n<|assistant|>\n영하 3도.{END}\n'
        f"<|user|>\n고마워{END}\n<|assistant|>\n"
    )
    assert_rendered(tokenizer, render_chat(tokenizer, messages), expected)


def test_without_thinking_the_block_is_empty_from_the_last_user_message_on(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    empty = "<think>\n\n</think>\n\n"
    call = {**CALL, "reasoning_content": ""}
    messages = written(tmp_path, QUESTION, {"role": "assistant", "content": "Well."}, THANKS)
    text = render_chat(tokenizer, messages, thinking=False)
    expected = (
        f"<|user|>\n서울 날씨?{END}\n<|assistant|>\nWell.{END}\n"
        f"<|user|>\n고마워{END}\n<|assistant|>\n{empty}"
    )
    assert_rendered(tokenizer, text, expected)
    # What was generated stays a prefix of the next step's text.
    longer = render_chat(tokenizer, [*messages, *written(tmp_path, call)], thinking=False)
    assert longer.startswith(f"{expected}{CALLS}{END}\n")


def test_exported_tokenizer_renders_the_same(
    tokenizer: Tokenizer, builtin: BuiltinData, tmp_path: Path
) -> None:
    save_hugging_face_tokenizer(builtin.tokenizer, tmp_path)
    exported = load_tokenizer(tmp_path)
    messages = written(tmp_path, SYSTEM, QUESTION, CALL, RESULT, ANSWER, THANKS)
    for thinking in (None, True, False):
        text = render_chat(exported, messages, [WEATHER], thinking)
        assert text == render_chat(tokenizer, messages, [WEATHER], thinking)
        assert exported.encode_chat(text) == tokenizer.encode_chat(text)


def test_a_tokenizers_own_template_is_used(tmp_path: Path) -> None:
    save_byte_level_tokenizer(tmp_path, [str(CALL)], 400)
    published = load_tokenizer(tmp_path)
    text = render_chat(published, [SYSTEM, QUESTION])
    end = "<|end_of_turn|>"
    assert text == f"<|begin|>[system]Be brief.{end}[user]서울 날씨?{end}[assistant]"
    names = [published.name_of(id) for id in published.encode_chat(text)]
    assert names.count(end) == 2
    assert names.count("<|begin|>") == 1
    (tmp_path / "chat_template.jinja").unlink()
    assert (
        render_chat(published, [QUESTION]) == f"<|begin|><|user|>\n서울 날씨?{end}\n<|assistant|>\n"
    )


def test_a_fine_tuned_tokenizer_without_a_template_gets_the_shipped_one(tmp_path: Path) -> None:
    save_byte_level_tokenizer(tmp_path / "tokenizer", [str(CALL)], 400)
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    own = template.read_text()
    add_chat_template(tmp_path)
    assert template.read_text() == own
    template.unlink()
    prompt = render_chat(load_tokenizer(tmp_path / "tokenizer"), [QUESTION])
    add_chat_template(tmp_path)
    full = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    options = {"tokenize": False, "add_generation_prompt": True}
    assert full.apply_chat_template([QUESTION], **options) == prompt
    add_chat_template(tmp_path / "of a SentencePiece model")


def test_ill_formed_files_are_named_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    call: dict[str, Any] = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    text_for_arguments = json.loads(json.dumps(call))
    text_for_arguments["tool_calls"][0]["function"]["arguments"] = "{broken"
    list_for_arguments = json.loads(json.dumps(call))
    list_for_arguments["tool_calls"][0]["function"]["arguments"] = "[1]"
    cases: dict[str, Any] = {
        "is not JSON": "[{",
        "is not a list of messages": {"role": "user"},
        "the conversation is empty": [],
        "message 1: role 'robot' is none of": [QUESTION, {"role": "robot", "content": "x"}],
        "message 0: role None": [{"content": "x"}],
        "message 0 has neither content nor tool_calls": [{"role": "user"}],
        "content is neither text nor a list": [{"role": "user", "content": 5}],
        "tool_calls is not a list": [{**call, "tool_calls": "f"}],
        "a tool call has no function with a name": [{**call, "tool_calls": [{"id": "1"}]}],
        "arguments of f are not JSON": [text_for_arguments],
        "arguments of f are not an object": [list_for_arguments],
    }
    for message, content in cases.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "chat.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_messages(tmp_path / "chat.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_messages(tmp_path / "none.json")
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {}}]')
    with pytest.raises(ValueError, match="tool 0 has no function with a name"):
        read_tools(tmp_path / "tools.json")
    picture = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    with pytest.raises(ValueError, match="content of type image cannot be read"):
        render_chat(tokenizer, [picture])
