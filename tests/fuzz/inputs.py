"""Damaged inputs through the readers that a user's files go through.

Each reader gets a folder of good files, one of which is damaged. It reads, or it says in a line
what is wrong; files that were there are as they were, and nothing unfinished has a final name.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from megatron_kanana.checkpoint.hugging_face.problems import ConversionError
from megatron_kanana.checkpoint.hugging_face.to_hugging_face import open_megatron, to_hugging_face
from megatron_kanana.checkpoint.hugging_face.to_megatron import open_hugging_face, to_megatron
from megatron_kanana.config import Environment, load_settings, read_settings
from megatron_kanana.config.chat_settings import ChatSettings
from megatron_kanana.config.problems import ConfigurationError
from megatron_kanana.config.saved_model import settings_of_saved_model
from megatron_kanana.data.chat import ChatTemplate, read_messages, read_tools
from megatron_kanana.data.conversation_store import ConversationStore, prepare_conversations
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from megatron_kanana.data.held_out import read_held_out
from megatron_kanana.data.preprocess import missing_key, preprocess
from megatron_kanana.data.preprocess_job import Job
from megatron_kanana.data.tokenizer import load_tokenizer
from tests.conversion.folders import random_tensors, write_folder
from tests.fuzz.limits import contents
from tests.fuzz.mutations import damaged_bytes, damaged_json
from tests.hugging_face_tokenizers import save_byte_level_tokenizer

SECONDS = 60.0

CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "time?"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "ask",
                "tool_calls": [
                    {"id": "1", "function": {"name": "time", "arguments": '{"zone": "KST"}'}}
                ],
            },
            {"role": "tool", "content": "12:00", "tool_call_id": "1"},
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nNoon."},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "time", "parameters": {"required": ["zone"]}},
            }
        ],
        "enable_thinking": True,
    },
]
DOCUMENTS = ["One text, 한국어.", "Another\none\n", "x" * 300, "def f():\n\treturn 1\n"]

Read = Callable[[Path], Any]
Damage = st.SearchStrategy[bytes]


@dataclass(frozen=True)
class Reader:
    """A way into the project for files.

    Attributes:
        read: reads below a folder that has the good files, one of them damaged.
        files: damage of each file that may be damaged.
        error: what says that it cannot be read.
    """

    read: Read
    files: dict[str, Damage]
    error: type[Exception] = ValueError


def make_special_files(folder: Path) -> None:
    """Make what a name may lead to that is no file: a pipe that nobody writes to, a loop."""
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()


def write_good_files(folder: Path, sentencepiece: Path) -> None:
    """Write good files of every kind below a folder.

    Args:
        folder: existing, empty.
        sentencepiece: a tokenizer to copy.
    """
    shutil.copyfile(sentencepiece, folder / "tokenizer.model")
    save_byte_level_tokenizer(folder / "tokenizer", DOCUMENTS, 300)
    (folder / "tokenizer" / "model.safetensors").unlink()
    lines = b"".join(_line({"text": text, "id": n}) for n, text in enumerate(DOCUMENTS))
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    paragraphs = "\n\n".join(DOCUMENTS).encode()
    (folder / "text.txt").write_bytes(paragraphs)
    with pyarrow.CompressedOutputStream(str(folder / "text.txt.zst"), "zstd") as stream:
        stream.write(paragraphs)
    table = pyarrow.table({"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
    (folder / "chat.jsonl").write_bytes(b"".join(map(_line, CONVERSATIONS)))
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": [CONVERSATIONS[0]["messages"]] * 3}), folder / "chat.parquet"
    )
    (folder / "messages.json").write_bytes(json.dumps(CONVERSATIONS[1]["messages"]).encode())
    (folder / "tools.json").write_bytes(json.dumps(CONVERSATIONS[1]["tools"]).encode())
    preprocess(Job((folder / "lines.jsonl",), folder / "dataset", folder / "tokenizer.model"))
    write_folder(folder / "model", random_tensors())
    save_byte_level_tokenizer(folder / "model", DOCUMENTS, 300)
    (folder / "model" / "model.safetensors").unlink()
    to_megatron(open_hugging_face(folder / "model", None), folder / "converted")
    interrupted = Job((folder / "lines.jsonl",), folder / "half", folder / "tokenizer.model")
    with contextlib.suppress(InterruptedError):
        preprocess(interrupted, on_bytes=_interrupt)


def _interrupt(done: int) -> None:
    if done:
        raise InterruptedError


def _line(values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _preprocess(*names: str) -> Read:
    def read(folder: Path) -> None:
        inputs = tuple(folder / name for name in names)
        job = Job(inputs, folder / "new", folder / "tokenizer.model", shard_bytes=200)
        if (problem := missing_key(job.inputs, job.text_key)) is not None:
            raise ValueError(problem)
        preprocess(job)
        assert preprocess(job) == preprocess(job)

    return read


def _preprocess_again(folder: Path) -> None:
    """The dataset is there; its notes are damaged."""
    preprocess(Job((folder / "lines.jsonl",), folder / "dataset", folder / "tokenizer.model"))


def _go_on(folder: Path) -> None:
    """A job was interrupted; its notes are damaged. Its folder is put back."""
    shutil.copytree(folder / "half.partial", folder / "new.partial")
    preprocess(Job((folder / "lines.jsonl",), folder / "new", folder / "tokenizer.model"))


def _model_of(checkpoint: Path) -> list[str]:
    """The model of a checkpoint, as words of the command line."""
    model = read_settings(checkpoint)["model"].items()
    return [f"model.{name}={json.dumps(value)}" for name, value in model]


def _conversations(name: str, tokenizer: str) -> Read:
    def read(folder: Path) -> None:
        store = prepare_conversations(
            [folder / name], load_tokenizer(folder / tokenizer), ChatSettings(), 200, folder / "new"
        )
        summary = ConversationStore(store).summary
        assert len(summary.reasons) == min(10, summary.rejected)
        assert all(reason and "\n" not in reason for reason in summary.reasons), summary.reasons

    return read


def _sentencepiece(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for text in DOCUMENTS:
        tokenizer.decode(tokenizer.encode(text))
        tokenizer.encode_chat(text)
    (folder / "new").mkdir()
    save_hugging_face_tokenizer(folder / "tokenizer.model", folder / "new")


def _hugging_face_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    for text in DOCUMENTS:
        tokenizer.decode(tokenizer.encode(text))
        tokenizer.encode_prompt(text)
    template = ChatTemplate(tokenizer)
    template.render_replies(CONVERSATIONS[0]["messages"])
    tokenizer.encode_chat(template.render(read_messages(folder / "messages.json")))


def _chat(folder: Path) -> None:
    template = ChatTemplate(load_tokenizer(folder / "tokenizer.model"))
    messages, tools = read_messages(folder / "messages.json"), read_tools(folder / "tools.json")
    template.render(messages, tools, thinking=True)


def _settings_with(*words: str) -> Read:
    def read(folder: Path) -> None:
        load_settings([word.replace("FOLDER", str(folder)) for word in words], Environment())

    return read


def _held_out(name: str) -> Read:
    return lambda folder: read_held_out(folder / name, load_tokenizer(folder / "tokenizer"), 16)


def _to_megatron(folder: Path) -> None:
    to_megatron(open_hugging_face(folder / "model", "drop"), folder / "new")


def _to_hugging_face(name: str) -> Read:
    return lambda folder: to_hugging_face(open_megatron(folder / name), folder / "new")


def _look(name: str) -> Read:
    def read(folder: Path) -> None:
        settings = settings_of_saved_model(folder / name, ["device=cpu"], Environment())
        assert settings.data.tokenizer is not None
        load_tokenizer(settings.data.tokenizer)

    return read


MOST_LETTERS = 4000


def check_input(reader: Reader, name: str, content: bytes, folder: Path) -> str:
    """Read a folder whose file `name` has the content.

    Returns:
        "read" or "refused".

    Raises:
        AssertionError: a message says too little, or the disk is not as it should be.
        Exception: anything else is a defect.
    """
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    before = contents(folder)
    try:
        reader.read(folder)
        result = "read"
    except reader.error as error:
        _check_message(error)
        result = "refused"
    finally:
        after = contents(folder)
        shutil.rmtree(folder / "new", ignore_errors=True)
        for path in folder.glob("new*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / name).write_bytes(good)
    new = {path for path in after if path.split(".")[0].split("/")[0] == "new"}
    changed = {path for path in before if after.get(path) != before[path]}
    assert not changed, f"files were changed: {changed}"
    whole = {path for path in new if ".partial" not in path}
    if result == "refused":
        assert not whole, f"refused, but {sorted(whole)} has a final name"
    return result


def _check_message(error: BaseException) -> None:
    """One of our own errors: not a library's, which would name no file and no remedy."""
    assert type(error).__module__.startswith(("megatron_kanana", "builtins")), repr(error)
    assert not isinstance(error, (UnicodeError, json.JSONDecodeError)), repr(error)
    text = str(error)
    assert text.strip(), f"no message: {error!r}"
    assert len(text) < MOST_LETTERS, f"a message of {len(text)} letters: {text[:200]}"
    if type(error) is ValueError:
        assert "\n" not in text, f"several lines: {text!r}"


def readers(folder: Path) -> dict[str, Reader]:
    """All of them, with the damage drawn from the good files of a folder."""

    def data(name: str) -> Damage:
        return damaged_bytes((folder / name).read_bytes())

    def values(name: str) -> Damage:
        return damaged_json(json.loads((folder / name).read_bytes()))

    def lines(items: list[Any]) -> Damage:
        line = st.sampled_from(items).flatmap(damaged_json)
        return st.lists(line, min_size=1, max_size=3).map(b"\n".join)

    documents: list[Any] = [{"text": text, "id": n} for n, text in enumerate(DOCUMENTS)]
    tokenizer = {
        f"tokenizer/{name}": values(f"tokenizer/{name}")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    }
    template = {"tokenizer/chat_template.jinja": data("tokenizer/chat_template.jinja")}
    model = {
        "model/config.json": values("model/config.json"),
        "model/model.safetensors.index.json": values("model/model.safetensors.index.json"),
        "model/model-00001-of-00003.safetensors": data("model/model-00001-of-00003.safetensors"),
    }
    converted = {
        name: data(name)
        for name in ("converted/settings.yaml", "converted/.metadata", "converted/common.pt")
    }
    chat = {"chat.jsonl": lines(CONVERSATIONS) | data("chat.jsonl")}
    found = {
        "JSON lines": Reader(_preprocess("lines.jsonl"), {"lines.jsonl": lines(documents)}),
        "compressed lines": Reader(
            _preprocess("lines.jsonl.gz"), {"lines.jsonl.gz": data("lines.jsonl.gz")}
        ),
        "text": Reader(_preprocess("text.txt"), {"text.txt": data("text.txt")}),
        "compressed text": Reader(
            _preprocess("text.txt.zst"), {"text.txt.zst": data("text.txt.zst")}
        ),
        "parquet": Reader(_preprocess("rows.parquet"), {"rows.parquet": data("rows.parquet")}),
        "a dataset that is there": Reader(
            _preprocess_again, {"dataset.manifest.json": values("dataset.manifest.json")}
        ),
        "an interrupted job": Reader(
            _go_on,
            {
                str(path.relative_to(folder)): values(str(path.relative_to(folder)))
                for path in sorted((folder / "half.partial").glob("*.json"))
            },
        ),
        "conversations": Reader(_conversations("chat.jsonl", "tokenizer.model"), chat),
        "conversations, own template": Reader(
            _conversations("chat.jsonl", "tokenizer"), {**chat, **template}
        ),
        "conversations of parquet": Reader(
            _conversations("chat.parquet", "tokenizer.model"),
            {"chat.parquet": data("chat.parquet")},
        ),
        "a chat to answer": Reader(
            _chat, {name: values(name) for name in ("messages.json", "tools.json")}
        ),
        "SentencePiece": Reader(_sentencepiece, {"tokenizer.model": data("tokenizer.model")}),
        "Hugging Face tokenizer": Reader(_hugging_face_tokenizer, {**tokenizer, **template}),
        "tokenizer of the settings": Reader(
            _settings_with("data.tokenizer=FOLDER/tokenizer", "model.vocab_size=300"),
            tokenizer,
            error=ConfigurationError,
        ),
        "dataset of the settings": Reader(
            _settings_with(
                *("data.blend=[{path:FOLDER/dataset}]", "data.tokenizer=FOLDER/tokenizer.model"),
                *(
                    "model.vocab_size=2048",
                    "data.held_out_percent=0",
                    "data.sequence_length=16",
                    "schedule.evaluation_interval=0",
                ),
            ),
            {"dataset.idx": data("dataset.idx"), "dataset.bin": data("dataset.bin")},
            error=ConfigurationError,
        ),
        "checkpoint of the settings": Reader(
            _settings_with(
                "checkpoint.load=FOLDER/converted",
                *_model_of(folder / "converted"),
                *("data.tokenizer=FOLDER/tokenizer", "checkpoint.load_what=weights"),
            ),
            {"converted/settings.yaml": data("converted/settings.yaml")},
            error=ConfigurationError,
        ),
        "held-out text": Reader(_held_out("lines.jsonl"), {"lines.jsonl": lines(documents)}),
        "held-out rows": Reader(_held_out("rows.parquet"), {"rows.parquet": data("rows.parquet")}),
        "a Hugging Face model": Reader(_to_megatron, model, error=ConversionError),
        "a converted checkpoint": Reader(
            _to_hugging_face("converted"), converted, error=ConversionError
        ),
        "a look at a checkpoint": Reader(
            _look("converted"),
            {"converted/settings.yaml": data("converted/settings.yaml")},
            error=ConfigurationError,
        ),
    }
    return found
