"""Write conversations in which the assistant calls tools, for the tiny model to learn from.

    python examples/kanana_2_tiny/make_tool_conversations.py data/tool_calls

train.jsonl and held_out.jsonl are Hugging Face chat files. The user asks for one of four things,
each with two values; two tools are offered, in any order, of which one fits. Pairs of values in
held_out.jsonl are in no conversation of train.jsonl. text.jsonl has the words of train.jsonl and of
the chat template, to train a tokenizer on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from megatron_kanana.data.export_tokenizer import CHAT_TEMPLATE


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow tonight")
CITIES = listed("Seoul Busan Jeju Daegu Paris Tokyo London Rome Oslo Cairo Lima Delhi Quito Perth")
ROOMS = listed("kitchen bedroom office garage hall bathroom attic cellar garden lounge")
MUSIC = listed("jazz rock folk opera blues soul metal disco techno swing reggae tango")
HOURS = listed("one two three five six seven eight nine eleven noon")
COLOURS = listed("red green blue white yellow purple orange pink brown grey")

HELD_OUT = 0.1  # of the pairs of values

TASKS: dict[str, tuple[tuple[str, list[str]], tuple[str, list[str]], tuple[str, ...]]]
TASKS = {
    "get_weather": (
        ("city", CITIES),
        ("day", DAYS),
        ("How is the weather in {0} on {1}?", "{1} in {0}: will it rain?", "{0} {1} 날씨 알려줘"),
    ),
    "play_music": (
        ("genre", MUSIC),
        ("room", ROOMS),
        ("Play some {0} in the {1}.", "I am in the {1}, put on {0}", "{1}에서 {0} 틀어줘"),
    ),
    "set_alarm": (
        ("day", DAYS),
        ("hour", HOURS),
        ("Wake me on {0} at {1}.", "Alarm at {1}, every {0}", "{0} {1} 알람 맞춰줘"),
    ),
    "set_light": (
        ("room", ROOMS),
        ("color", COLOURS),
        ("Make the {0} {1}.", "I want {1} light in the {0}", "{0} 불 {1}으로 바꿔줘"),
    ),
}


def schema(name: str) -> dict[str, Any]:
    """A tool's schema, as short as can be."""
    required = [argument for argument, _ in TASKS[name][:2]]
    return {"name": name, "parameters": {"type": "object", "required": required}}


def conversation(
    name: str, values: tuple[str, str], words: str, other: str, *, first: bool
) -> dict[str, Any]:
    """A request and the call that answers it."""
    arguments = dict(zip((argument for argument, _ in TASKS[name][:2]), values, strict=True))
    call = {"function": {"name": name, "arguments": arguments}}
    tools = [schema(name), schema(other)]
    return {
        "messages": [
            {"role": "user", "content": words.format(*values)},
            {"role": "assistant", "tool_calls": [call]},
        ],
        "tools": tools if first else tools[::-1],
    }


def conversations(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations to train on, and held-out ones with other pairs of values."""
    generator = random.Random(seed)
    training: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for name, ((_, firsts), (_, seconds), phrasings) in TASKS.items():
        others = [other for other in TASKS if other != name]
        for pair in itertools.product(firsts, seconds):
            if generator.random() < HELD_OUT:
                for words in phrasings:
                    other, first = generator.choice(others), generator.random() < 0.5
                    held_out.append(conversation(name, pair, words, other, first=first))
                continue
            for words, other, first in itertools.product(phrasings, others, (False, True)):
                training.append(conversation(name, pair, words, other, first=first))
    generator.shuffle(training)
    return training, held_out


def words_of(record: dict[str, Any]) -> str:
    """A conversation's tools, request and call, as the chat template writes them."""
    request, reply = record["messages"]
    parts = [*record["tools"], request["content"], reply["tool_calls"][0]["function"]]
    return "\n".join(
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts
    )


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are held out")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    training, held_out = conversations(options.seed)
    for name, records in (("train", training), ("held_out", held_out)):
        path = options.folder / f"{name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(records)} conversations")
    texts = [CHAT_TEMPLATE.read_text(encoding="utf-8"), *map(words_of, training)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (options.folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
