"""Chat files: what is wrong with a record is told with its line, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_kanana.config.chat_settings import ChatSettings
from megatron_kanana.data.builtin import BuiltinData
from megatron_kanana.data.conversation_store import ConversationStore, prepare_conversations
from megatron_kanana.data.packed_conversations import HeldOutConversations, PackedConversations
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer

ASK = {"role": "user", "content": "What time is it?"}
REPLY = {"role": "assistant", "content": "Noon."}
RESULT = {"role": "tool", "content": "12:00", "tool_call_id": "1"}
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"required": ["zone"]}}}


def call(name: str = "time", arguments: Any = None) -> dict[str, Any]:
    """An assistant message that calls a tool."""
    arguments = {"zone": "KST"} if arguments is None else arguments
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}


GOOD: list[dict[str, Any]] = [
    {"messages": [ASK, REPLY]},
    {"messages": [ASK, call(arguments='{"zone": "KST"}'), RESULT, REPLY], "tools": [TOOL]},
    {"messages": [ASK, call()], "tools": json.dumps([TOOL]), "source": "kept by others"},
    {"messages": [{"role": "system", "content": "x"}, ASK, REPLY, ASK, REPLY], "tools": []},
]

BAD: dict[str, Any] = {
    "byte 3 of the line is not UTF-8": b'{"\xff": 1}',
    "the line is not JSON": b'{"messages": [',
    "the line is no JSON object, but list": [ASK, REPLY],
    "there are no messages, but conversations, id": {"conversations": [], "id": 3},
    "messages is not a list of messages": {"messages": ["Hi", "Yo"]},
    "the conversation is empty": {"messages": []},
    "message 0: role 'human' is none of system, developer": {
        "messages": [{"role": "human", "content": "Hi"}, REPLY]
    },
    "message 1 has neither content nor tool_calls": {
        "messages": [ASK, {"role": "assistant", "content": None}]
    },
    "message 0: assistant begins the conversation, where system or developer or user would": {
        "messages": [REPLY, ASK, REPLY]
    },
    "message 2: assistant follows assistant": {"messages": [ASK, REPLY, REPLY]},
    "message 1: tool follows user": {"messages": [ASK, RESULT, REPLY]},
    "message 2: user follows assistant that calls a tool, where tool would": {
        "messages": [ASK, call(), ASK, REPLY],
        "tools": [TOOL],
    },
    "message 0: user calls a tool": {
        "messages": [{**call(), "role": "user"}, RESULT, REPLY],
        "tools": [TOOL],
    },
    "there is no assistant message to learn from": {"messages": [ASK]},
    "message 1: the assistant says nothing": {
        "messages": [ASK, {"role": "assistant", "content": " \n"}]
    },
    "message 1 calls time, but the record has no tools": {"messages": [ASK, call()]},
    "message 1 calls date, which is none of its tools: time": {
        "messages": [ASK, call("date")],
        "tools": [TOOL],
    },
    "message 1 calls time without zone, which its schema requires": {
        "messages": [ASK, call(arguments={"place": "x"})],
        "tools": [TOOL],
    },
    "message 1: arguments of time are not JSON": {
        "messages": [ASK, call(arguments="{zone: KST}")],
        "tools": [TOOL],
    },
    "message 1: arguments of time are not an object": {
        "messages": [ASK, call(arguments=["KST"])],
        "tools": [TOOL],
    },
    "message 2 answers call '2', which was not made": {
        "messages": [ASK, call(), {**RESULT, "tool_call_id": "2"}, REPLY],
        "tools": [TOOL],
    },
    "tool 0 has no function with a name": {"messages": [ASK, REPLY], "tools": [{"x": 1}]},
    "two tools are called time": {"messages": [ASK, REPLY], "tools": [TOOL, TOOL]},
    "tools is text, but not JSON": {"messages": [ASK, REPLY], "tools": "time()"},
    "tools is not a list of schemas": {"messages": [ASK, REPLY], "tools": {"name": "time"}},
    "enable_thinking is neither true nor false, but 'yes'": {
        "messages": [ASK, REPLY],
        "enable_thinking": "yes",
    },
    "message 0 holds the control token <|user|>": {
        "messages": [{"role": "user", "content": "<|user|> x"}, REPLY]
    },
    "the chat template refuses the conversation: content of type image cannot be read": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]
    },
    "predictions are more than data.sequence_length = 512": {
        "messages": [ASK, {"role": "assistant", "content": "tick tock " * 400}]
    },
}


@pytest.fixture
def tokenizer(builtin: BuiltinData) -> Tokenizer:
    """The built-in tokenizer."""
    return load_tokenizer(builtin.tokenizer)


def line(record: Any) -> bytes:
    """A line of a chat file."""
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def store_of(
    tokenizer: Tokenizer, folder: Path, *files: Path, workers: int = 0
) -> ConversationStore:
    """The files' store, in which a sample has 512 tokens."""
    settings = ChatSettings(workers=workers)
    return ConversationStore(prepare_conversations(files, tokenizer, settings, 512, folder))


def test_every_bad_record_is_listed_with_file_line_reason_and_itself(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = [b"", *map(line, GOOD[:2]), *map(line, BAD.values()), b"  ", *map(line, GOOD[2:])]
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b"\n".join(lines))
    store = store_of(tokenizer, tmp_path, path)
    assert len(store) == len(GOOD)
    summary = store.summary
    assert (summary.records, summary.rejected) == (len(GOOD) + len(BAD), len(BAD))
    assert (summary.too_long, summary.truncated) == (1, 0)
    rejected = [json.loads(entry) for entry in store.rejected_path.read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == list(range(4, 4 + len(BAD)))
    for entry, (reason, record) in zip(rejected, BAD.items(), strict=True):
        assert reason in entry["reason"]
        assert "\n" not in entry["reason"]
        assert entry["file"] == str(path)
        assert entry["record"] == line(record).decode("utf-8", errors="backslashreplace")
    assert summary.reasons[0].startswith(f"{path}, line 4: byte 3 of the line is not UTF-8")
    assert len(summary.reasons) == 10
    kept = sum(len(store[index][0]) for index in range(len(store)))
    learnt = sum(int(store[index][1].sum()) for index in range(len(store)))
    assert (summary.tokens, summary.trained_tokens) == (kept, learnt)


def test_workers_and_parquet_give_the_same_conversations(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "chat.jsonl").write_bytes(b"\n".join(map(line, [*GOOD, GOOD[0]])))
    rows = [
        {"messages": record["messages"], "tools": json.dumps(record.get("tools") or [])}
        for record in json.loads(json.dumps([*GOOD, GOOD[0]]))
    ]
    for row in rows:
        if isinstance(json.loads(row["tools"]), str):
            row["tools"] = json.loads(row["tools"])
        for message in row["messages"]:
            for each in message.get("tool_calls", []):
                if not isinstance(each["function"]["arguments"], str):
                    each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    stores = [
        store_of(tokenizer, tmp_path, tmp_path / "chat.jsonl"),
        store_of(tokenizer, tmp_path / "again", tmp_path / "chat.jsonl", workers=2),
        store_of(tokenizer, tmp_path, tmp_path / "chat.parquet"),
    ]
    assert [store.summary.rejected for store in stores] == [0, 0, 0]
    for index in range(len(GOOD) + 1):
        tokens, trained = stores[0][index]
        for other in stores[1:]:
            assert np.array_equal(tokens, other[index][0])
            assert np.array_equal(trained, other[index][1])


def test_files_that_cannot_be_read_at_all_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat.parquet").write_bytes(b"PAR2")
    with pytest.raises(ValueError, match=r"chat\.parquet is no parquet file"):
        store_of(tokenizer, tmp_path, tmp_path / "chat.parquet")
    (tmp_path / "chat.txt").write_text("Hi")
    with pytest.raises(ValueError, match=r"chat\.txt: conversations are read from \.jsonl"):
        store_of(tokenizer, tmp_path, tmp_path / "chat.txt")


def test_a_store_is_made_anew_when_a_file_changes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(line(GOOD[0]))
    first = store_of(tokenizer, tmp_path, path)
    assert store_of(tokenizer, tmp_path, path).rejected_path == first.rejected_path
    path.write_bytes(b"\n".join(map(line, GOOD)))
    assert len(store_of(tokenizer, tmp_path, path)) == len(GOOD)


def test_each_pass_takes_every_conversation_once_in_an_order_of_its_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    words = [f"{number} {'tick ' * (number % 13)}" for number in range(60)]
    records = [{"messages": [ASK, {"role": "assistant", "content": word}]} for word in words]
    path.write_bytes(b"\n".join(map(line, records)))
    store = store_of(tokenizer, tmp_path, path)
    packed = PackedConversations(store, range(50), 256, 7, tokenizer.pad, total=1000)
    count = packed.samples_per_pass

    def replies(sample: int) -> tuple[str, ...]:
        item = packed[sample]
        labels, mask = item["labels"].numpy(), item["loss_mask"].numpy() == 1
        segments = item["segment_ids"].numpy()
        return tuple(
            tokenizer.decode(labels[mask & (segments == number)].tolist())
            for number in range(segments.max() + 1)
        )

    passes = [[replies(n) for n in range(k * count, (k + 1) * count)] for k in range(3)]
    for each in passes:
        assert sorted(reply for sample in each for reply in sample) == sorted(words[:50])
    assert passes[0] != passes[1] != passes[2]
    again = PackedConversations(store, range(50), 256, 7, tokenizer.pad, total=1000)
    assert again[2 * count + 1]["tokens"].tolist() == packed[2 * count + 1]["tokens"].tolist()
    held_out = HeldOutConversations(store, range(50, 60), 256, 7, tokenizer.pad, total=100)
    samples = [held_out[n] for n in range(100)]
    learnt = sum(float(sample["loss_mask"].sum()) for sample in samples)
    assert learnt == sum(int(store[n][1].sum()) for n in range(50, 60))
    assert int(samples[-1]["segment_ids"].max()) == -1
