"""Supervised fine-tuning as a user does it: data, tokenizer, training, export, transformers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.launch import run_python

TRAINING_SECONDS = 180


def succeed(*arguments: str, processes: int = 1) -> None:
    """Run Python; what it printed is the message if it fails."""
    finished = run_python(*arguments, processes=processes, timeout=TRAINING_SECONDS)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.timeout(400)
def test_a_tiny_model_learns_to_call_tools_and_answers_through_transformers(
    tmp_path: Path,
) -> None:
    data, run = tmp_path / "data", tmp_path / "runs" / "sft"
    succeed("examples/kanana_2_tiny/make_tool_conversations.py", str(data))
    sample = ("--sample", f"calls={data / 'text.jsonl'}", "--output", str(data / "tokenizer"))
    size = ("--vocab-size", "1024", "--special-slots", "32", "--fill")
    succeed("tools/train_tokenizer.py", *sample, *size)
    start = time.monotonic()
    succeed(
        *("-m", "megatron_kanana.train", "experiment=kanana_2_tiny_sft", "run_name=sft"),
        *(f"output_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"),
        f"data.conversations=[{data / 'train.jsonl'}]",
        f"data.held_out_conversations=[{data / 'held_out.jsonl'}]",
        f"data.tokenizer={data / 'tokenizer'}",
        *("device=cpu", "logging.tensorboard=false", "logging.report=false"),
        processes=2,
    )
    assert time.monotonic() - start < TRAINING_SECONDS
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [each["evaluation_loss"] for each in records if "evaluation_loss" in each]
    assert len(evaluations) == 4
    assert evaluations[-1] < 0.1 * evaluations[0]
    (checkpoint,) = (run / "checkpoints").iterdir()
    exported = ("--megatron", str(checkpoint), "--out", str(tmp_path / "hf"))
    succeed("tools/convert_checkpoint.py", "to-hf", *exported)
    held_out = [json.loads(line) for line in (data / "held_out.jsonl").read_text().splitlines()]
    learnt = {
        line["messages"][1]["tool_calls"][0]["function"]["name"]
        + json.dumps(line["messages"][1]["tool_calls"][0]["function"]["arguments"])
        for line in map(json.loads, (data / "train.jsonl").read_text().splitlines())
    }
    right = answers(tmp_path / "hf", held_out)
    for record, (answer, ended) in zip(held_out, right, strict=True):
        call = record["messages"][1]["tool_calls"][0]["function"]
        assert call["name"] + json.dumps(call["arguments"]) not in learnt
        record["right"] = ended and answer == (
            f'<tool_call>{{"name": "{call["name"]}", "arguments": {json.dumps(call["arguments"])}}}'
            "</tool_call>"
        )
    assert len(held_out) >= 40
    wrong = [record["messages"] for record in held_out if not record["right"]]
    assert len(wrong) <= 0.05 * len(held_out), wrong


def answers(folder: Path, records: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What transformers' model of a folder replies to each first message, and whether it ended."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model.eval()
    found = []
    for record in records:
        prompt = tokenizer.apply_chat_template(
            record["messages"][:1],
            tools=record["tools"],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = prompt["input_ids"]
        mask = prompt["attention_mask"]
        out = model.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False)
        reply = out[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(reply, skip_special_tokens=True)
        found.append((text, reply[-1] == tokenizer.eos_token_id))
    return found
