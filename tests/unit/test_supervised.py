"""What is learnt of a conversation, token by token, and how conversations share samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from megatron_kanana.config.chat_settings import ChatSettings
from megatron_kanana.data.builtin import BuiltinData
from megatron_kanana.data.conversations import parse_conversation
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from megatron_kanana.data.packed_conversations import packed_sample
from megatron_kanana.data.packing import pack
from megatron_kanana.data.supervised import ConversationEncoder, Example, TooLongError
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer
from tests.hugging_face_tokenizers import save_byte_level_tokenizer

END = "<|end_of_document|>"
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"required": ["city"]}}},
    {"name": "time"},
]
CALL = {"id": "1", "function": {"name": "weather", "arguments": {"city": "서울"}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "서울 날씨?"},
    {"role": "assistant", "reasoning_content": "Ask.", "tool_calls": [CALL, {"name": "time"}]},
    {"role": "tool", "tool_call_id": "1", "content": '{"celsius": -3}'},
    {"role": "tool", "content": "12:30"},
    {"role": "assistant", "content": "영하 3도,\n  12:30."},
    {"role": "user", "content": "And in \t Busan?"},
    {"role": "assistant", "reasoning_content": "No tool.\n", "content": "I do not know."},
]
CALLS = (
    '<tool_call>{"name": "weather", "arguments": {"city": "서울"}}</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
)
LAST = "<think>\nNo tool.\n</think>\n\nI do not know."


def encode(
    tokenizer: Tokenizer, settings: ChatSettings, record: dict[str, Any], max_tokens: int = 4096
) -> Example:
    """A record as it would be read, as an example."""
    conversation = parse_conversation(json.dumps(record).encode())
    return ConversationEncoder(tokenizer, settings, max_tokens).encode(conversation)


def learnt_texts(tokenizer: Tokenizer, example: Example) -> list[str]:
    """Text of each run of learnt tokens, its end of turn spelt out."""
    texts, run = [], []
    for token, trained in zip([*example.tokens, -1], [*example.trained, False], strict=True):
        if trained:
            run.append(token)
        elif run:
            assert run[-1] in tokenizer.stop_ids
            texts.append(tokenizer.decode(run[:-1]) + tokenizer.name_of(run[-1]))
            run = []
    return texts


@pytest.fixture
def tokenizer(builtin: BuiltinData) -> Tokenizer:
    """The built-in tokenizer, which brings no template."""
    return load_tokenizer(builtin.tokenizer)


@pytest.fixture
def exported(builtin: BuiltinData, tmp_path: Path) -> Path:
    """The same tokenizer as transformers loads it."""
    folder = tmp_path / "exported"
    folder.mkdir()
    save_hugging_face_tokenizer(builtin.tokenizer, folder)
    return folder


@pytest.mark.parametrize("thinking", [None, True, False])
def test_learnt_tokens_are_those_that_transformers_masks_by_the_template(
    tokenizer: Tokenizer, exported: Path, thinking: bool | None
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(str(exported))
    options = {} if thinking is None else {"enable_thinking": thinking}
    for messages in (MESSAGES, MESSAGES[:3], MESSAGES[1:6], MESSAGES[6:]):
        for tools in (TOOLS, None) if "tool_calls" not in str(messages) else (TOOLS,):
            record: dict[str, Any] = {"messages": messages, "tools": tools, **options}
            expected = theirs.apply_chat_template(
                parse_conversation(json.dumps(record).encode()).messages,
                tools=tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **options,
            )
            for ours in (tokenizer, load_tokenizer(exported)):
                example = encode(ours, ChatSettings(), record)
                assert example.tokens == expected["input_ids"]
                assert example.trained == [bool(mask) for mask in expected["assistant_masks"]]


def test_replies_are_learnt_with_their_ends_and_nothing_else_is(tokenizer: Tokenizer) -> None:
    record = {"messages": MESSAGES, "tools": TOOLS}
    example = encode(tokenizer, ChatSettings(), record)
    replies = [CALLS, "영하 3도,\n  12:30.", LAST]
    assert learnt_texts(tokenizer, example) == [reply + END for reply in replies]
    last = encode(tokenizer, ChatSettings(train_on="last_reply"), record)
    assert learnt_texts(tokenizer, last) == [LAST + END]
    assert last.tokens == example.tokens
    dropped = encode(tokenizer, ChatSettings(reasoning="drop"), record)
    assert learnt_texts(tokenizer, dropped)[-1] == "I do not know." + END
    inline = [*MESSAGES[:-1], {"role": "assistant", "content": LAST}]
    as_field = encode(tokenizer, ChatSettings(), {"messages": inline, "tools": TOOLS})
    assert as_field == example
    assert encode(tokenizer, ChatSettings(reasoning="drop"), {**record, "messages": inline}) == (
        dropped
    )


def test_the_empty_block_without_thinking_belongs_to_the_prompt(tokenizer: Tokenizer) -> None:
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    }
    settings = ChatSettings(enable_thinking=False)
    example = encode(tokenizer, settings, record)
    prompt = f"<|user|>\nHi{END}\n<|assistant|>\n<think>\n\n</think>\n\n"
    assert example.tokens == tokenizer.encode_chat(f"{prompt}Yo{END}\n")
    assert learnt_texts(tokenizer, example) == ["Yo" + END]
    own = encode(tokenizer, settings, {**record, "enable_thinking": True})
    assert tokenizer.decode(own.tokens).count("<think>") == 0


def test_a_template_that_marks_no_replies_is_compared_with_its_prompts(tmp_path: Path) -> None:
    save_byte_level_tokenizer(tmp_path, [str(MESSAGES)], 400)
    published = load_tokenizer(tmp_path)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    example = encode(published, ChatSettings(), {"messages": messages})
    end = "<|end_of_turn|>"
    assert learnt_texts(published, example) == ["Yo" + end, "See you" + end]
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages | length }}" + template.read_text())
    with pytest.raises(ValueError, match="does not mark replies"):
        encode(published, ChatSettings(), {"messages": messages})


def test_too_long_conversations_are_told_or_cut(tokenizer: Tokenizer) -> None:
    record = {"messages": MESSAGES, "tools": TOOLS}
    whole = encode(tokenizer, ChatSettings(), record)
    fits = len(whole.tokens) - 1
    assert encode(tokenizer, ChatSettings(), record, fits) == whole
    with pytest.raises(TooLongError, match=rf"^{fits} predictions are more than .* = {fits - 1}$"):
        encode(tokenizer, ChatSettings(), record, fits - 1)
    cut = encode(tokenizer, ChatSettings(too_long="truncate"), record, fits - 9)
    assert cut == Example(whole.tokens[:-9], whole.trained[:-9], truncated=True)
    with pytest.raises(ValueError, match="nothing the assistant writes in its first 20 tokens"):
        encode(tokenizer, ChatSettings(too_long="truncate"), record, 20)


def test_names_of_control_tokens_in_a_message_are_refused(tokenizer: Tokenizer) -> None:
    for name in (END, "<|assistant|>"):
        messages = [{"role": "user", "content": f"x {name}"}, MESSAGES[-1]]
        with pytest.raises(ValueError, match="message 0 holds the control token"):
            encode(tokenizer, ChatSettings(), {"messages": messages})


def test_packing_is_tight_whole_and_the_same_for_a_seed() -> None:
    lengths = np.random.default_rng(1).integers(1, 400, 3000)
    items, begins = pack(lengths, 1024, seed=5)
    assert sorted(items.tolist()) == list(range(3000))
    sums = np.add.reduceat(lengths[items], begins[:-1])
    assert sums.max() <= 1024
    assert len(sums) <= 1.01 * lengths.sum() / 1024 + 1
    again = pack(lengths, 1024, seed=5)
    assert np.array_equal(items, again[0])
    assert np.array_equal(begins, again[1])
    assert not np.array_equal(items, pack(lengths, 1024, seed=6)[0])
    assert [len(array) for array in pack(np.empty(0, dtype=np.int64), 8, seed=0)] == [0, 1]


def test_a_packed_sample_holds_each_conversations_predictions() -> None:
    one = (np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True]))
    two = (np.array([8, 9], dtype=np.int32), np.array([False, True]))
    sample = {name: tensor.tolist() for name, tensor in packed_sample([one, two], 5, 2).items()}
    assert sample == {
        "tokens": [5, 6, 8, 2, 2],
        "labels": [6, 7, 9, 2, 2],
        "loss_mask": [0.0, 1.0, 1.0, 0.0, 0.0],
        "position_ids": [0, 1, 0, 0, 0],
        "segment_ids": [0, 0, 1, -1, -1],
    }
