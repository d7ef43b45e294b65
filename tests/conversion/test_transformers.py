"""Converted checkpoints beside transformers, an independent implementation, in every layout."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_kanana.config.schema import ModelSettings
from tests.conversion.test_round_trip import assert_identical, convert, loaded
from tests.launch import run_python
from tests.model.beside_transformers import hugging_face_config, small_settings
from tests.model.test_parity import CASES

LAYOUTS = {
    "one process": (1, []),
    "TP2": (2, ["parallel.tensor_parallel_size=2"]),
    "PP2": (2, ["parallel.pipeline_parallel_size=2"]),
    "EP2": (2, ["parallel.expert_parallel_size=2"]),
}
EVERYTHING = {"tensor": 2, "pipeline": 2, "expert": 2}
SCRIPT = "tests/conversion/under_layout.py"


def random_model(model: ModelSettings, seed: int) -> Any:
    """transformers' model with random weights, gains and biases that matter."""
    torch.manual_seed(seed)
    theirs = transformers.DeepseekV3ForCausalLM(hugging_face_config(model)).eval()
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1)
            elif "norm" in name:
                tensor.normal_(1.0, 0.1)
            elif tensor.dim() >= 2 and tensor.numel():
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
    return theirs


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """For each case of the grid: the checkpoint, tokens, and transformers' logits of them."""
    folder = tmp_path_factory.mktemp("grid")
    cases = {}
    for number, (name, (length, overrides)) in enumerate(CASES.items()):
        theirs = random_model(small_settings(list(overrides)).model, number)
        here = folder / str(number)
        theirs.save_pretrained(here / "hf")
        checkpoint = here / "checkpoint"
        assert convert("to-megatron", "--hf", here / "hf", "--out", checkpoint) == 0
        even = length + length % 2  # sequence parallelism deals it over two processes
        tokens = torch.randint(theirs.config.vocab_size, (2, even))
        torch.save(tokens, here / "tokens.pt")
        with torch.no_grad():
            torch.save(theirs(tokens).logits, here / "expected.pt")
        cases[name] = {"checkpoint": str(checkpoint), "tokens": str(here / "tokens.pt")}
    return cases


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    layout: str, converted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    processes, overrides = LAYOUTS[layout]
    if layout == "TP2":  # a single head cannot be split
        converted = {name: case for name, case in converted.items() if "1 head" not in name}
    files = {name: tmp_path / f"{number}.pt" for number, name in enumerate(converted)}
    cases = [{**case, "logits": str(files[name])} for name, case in converted.items()]
    finished = run_python(SCRIPT, json.dumps(cases), *overrides, processes=processes)
    assert finished.returncode == 0, finished.stderr
    for name, case in converted.items():
        expected = torch.load(Path(case["tokens"]).with_name("expected.pt"))
        assert expected.std() > 0.5
        difference = (torch.load(files[name]) - expected).abs().max()
        assert difference < 1e-4, (name, float(difference))


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """Warnings of transformers and of Python, as they come."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collector(logging.WARNING)
    transformers.logging.add_handler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    transformers.logging.remove_handler(handler)
    messages += [str(warning.message) for warning in caught]


def test_round_trip_through_a_split_model_is_bit_identical(
    tmp_path: Path, complaints: list[str]
) -> None:
    """Hugging Face -> TP2 x PP2 x EP2 -> Hugging Face, in bf16 with the router's bias in fp32."""
    theirs = random_model(small_settings([]).model, 99).to(torch.bfloat16)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(buffer.shape)
    source, back = tmp_path / "source", tmp_path / "back"
    theirs.save_pretrained(source, max_shard_size="200KB")
    sizes = [f"--{kind}-parallel-size={size}" for kind, size in EVERYTHING.items()]
    checkpoint, resaved = tmp_path / "checkpoint", tmp_path / "resaved"
    assert convert("to-megatron", "--hf", source, "--out", checkpoint, *sizes) == 0
    case = {"checkpoint": str(checkpoint), "save": str(resaved)}
    finished = run_python(SCRIPT, json.dumps([case]), "precision.compute=bf16", processes=4)
    assert finished.returncode == 0, finished.stderr
    assert convert("to-hf", "--megatron", resaved, "--out", back) == 0
    tensors = loaded(source)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16", "torch.float32"}
    assert_identical(loaded(back), tensors)

    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (source, back)
    )
    assert not complaints
    prompt = torch.randint(2048, (1, 7))
    generated = [
        model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)
        for model in (before, after)
    ]
    assert torch.equal(*generated)
    assert generated[0].shape[1] == 23
