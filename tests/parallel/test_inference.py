"""A cached forward is a recomputed one, and text is predicted alike, in every layout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kanana import device
from megatron_kanana.data.builtin import BuiltinData
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from tests.conftest import TEST_VOCAB_SIZE
from tests.launch import free_ports, run_python, train
from tests.parallel.inspect_model import NEW_TOKENS, PROMPT_LENGTHS, WINDOW
from tools import evaluate, generate

SCRIPT = str(Path(__file__).parent / "inspect_model.py")

MODEL_VOCABULARY, PADDED_VOCABULARY = 3000, 3072  # the tokenizer has 2048

LAYOUTS = {
    "TP2": ["parallel.tensor_parallel_size=2"],
    "CP2": ["parallel.context_parallel_size=2"],
    "PP2": ["parallel.pipeline_parallel_size=2"],
    "PP2 with 2 virtual stages": [
        "parallel.pipeline_parallel_size=2",
        "parallel.virtual_pipeline_stages=2",
    ],
    "EP2 over DP2": ["parallel.expert_parallel_size=2"],
}


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, builtin: BuiltinData
) -> Path:
    """A model whose logits are far apart, with YaRN and a layer for multi-token prediction.

    Its tokenizer is a folder of Hugging Face's files, with fewer ids than the model has.
    """
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer").mkdir()
    save_hugging_face_tokenizer(builtin.tokenizer, folder / "tokenizer")
    train(
        *(folder, cache_dir, "run", "stop_after_step=1", "model.init_std=0.15"),
        *("model.num_mtp_layers=1", "model.yarn_factor=4", "model.yarn_original_context=256"),
        *(f"data.tokenizer={folder / 'tokenizer'}", f"model.vocab_size={MODEL_VOCABULARY}"),
        f"data.blend=[{{path:{builtin.datasets[0][0]},weight:1}}]",
    )
    return folder / "run" / "checkpoints" / "step_00000001"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents; the last window of 62 tokens is not full."""
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("def f(x):\n    return x\n\n한국어 문서입니다.\n\n" + "import os\n" * 40)
    return path


def inspect(
    folder: Path, checkpoint: Path, text: Path, layouts: Mapping[str, Sequence[str]], processes: int
) -> dict[str, dict[str, Any]]:
    """What the model of the checkpoint says, by layout."""
    outputs = {layout: folder / f"{number}.npz" for number, layout in enumerate(layouts)}
    jobs = [
        [port, str(outputs[layout]), overrides]
        for port, (layout, overrides) in zip(free_ports(len(layouts)), layouts.items(), strict=True)
    ]
    finished = run_python(SCRIPT, str(checkpoint), str(text), json.dumps(jobs), processes=processes)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return {layout: dict(np.load(output)) for layout, output in outputs.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text: Path) -> dict[str, Any]:
    """What it says on one process."""
    folder = tmp_path_factory.mktemp("alone")
    return inspect(folder, checkpoint, text, {"one process": []}, 1)["one process"]


@pytest.fixture(scope="module")
def in_layouts(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text: Path
) -> dict[str, dict[str, Any]]:
    """What it says in each layout."""
    return inspect(tmp_path_factory.mktemp("layouts"), checkpoint, text, LAYOUTS, 2)


def assert_cache_changes_nothing(found: dict[str, Any]) -> None:
    """Logits as recomputed, and the largest of them chosen."""
    for length in PROMPT_LENGTHS:
        cached, recomputed = found[f"cached {length}"], found[f"recomputed {length}"]
        assert cached.shape == recomputed.shape == (NEW_TOKENS + 1, PADDED_VOCABULARY)
        np.testing.assert_allclose(cached, recomputed, rtol=0, atol=1e-4)
        known = recomputed[:-1, :TEST_VOCAB_SIZE]
        assert found[f"greedy {length}"].tolist() == known.argmax(1).tolist()


def test_one_process_has_the_logits_of_recomputation(alone: dict[str, Any]) -> None:
    assert_cache_changes_nothing(alone)
    every = np.concatenate([alone[f"recomputed {length}"] for length in PROMPT_LENGTHS])
    assert (every.argmax(1) >= TEST_VOCAB_SIZE).any()  # ids that generation passes over
    assert np.std(alone["cached 37"]) > 0.5
    assert len({*alone["sampled 37"].tolist(), *alone["sampled 600"].tolist()}) > NEW_TOKENS


def test_loss_is_that_of_float64_logits(alone: dict[str, Any]) -> None:
    nats, predicted, loss, _ = alone["loss"]
    assert nats == pytest.approx(float(alone["exact"]), rel=1e-6)
    assert loss == nats / predicted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(
    layout: str, in_layouts: dict[str, dict[str, Any]], alone: dict[str, Any]
) -> None:
    found = in_layouts[layout]
    assert_cache_changes_nothing(found)
    for length in PROMPT_LENGTHS:
        np.testing.assert_allclose(
            found[f"cached {length}"], alone[f"cached {length}"], rtol=0, atol=1e-4
        )
        for kind in ("greedy", "sampled"):
            assert found[f"{kind} {length}"].tolist() == alone[f"{kind} {length}"].tolist()
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_generate_answers_a_conversation_with_tools(checkpoint: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "서울 날씨?"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "weather", "parameters": {}}]))
    finished = run_python(
        *("tools/generate.py", str(checkpoint), "--chat", str(tmp_path / "chat.json")),
        *("--tools", str(tmp_path / "tools.json"), "--no-thinking", "--temperature", "0"),
        *("--max-tokens", "500", "device=cpu", "data.sequence_length=200"),
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip()
    assert "날씨" not in finished.stdout  # the answer alone
    assert "ended by: context full]" in finished.stderr


def test_evaluate_prints_what_was_predicted(
    checkpoint: Path, text: Path, alone: dict[str, Any]
) -> None:
    finished = run_python(
        *("tools/evaluate.py", str(checkpoint), "--data", str(text), str(text), "--json"),
        *("--sequence-length", str(WINDOW), "--batch-size", "3", "device=cpu"),
        processes=2,
    )
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    nats, predicted, loss, bits = alone["loss"]
    of_file = printed["files"][str(text)]
    assert of_file["nats"] == pytest.approx(nats, rel=1e-6)
    assert of_file["predicted"] == predicted
    assert printed["all"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert printed["all"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert of_file["documents"] == 3


def test_mistakes_are_answered_before_anything_starts(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(*_: object) -> None:
        pytest.fail("processes were started")

    monkeypatch.setattr(device, "prepare_device", lambda *_: None)
    monkeypatch.setattr(device, "initialize_process_groups", start)
    (tmp_path / "bad.json").write_text('[{"role": "robot", "content": "x"}]')
    (tmp_path / "good.json").write_text('[{"role": "user", "content": "x"}]')
    (tmp_path / "one.txt").write_text("x\n\ny")
    chat = ("--chat", str(tmp_path / "good.json"))
    cases: list[tuple[Callable[[], int], tuple[str, ...], str]] = [
        (generate.main, ("--chat", str(tmp_path / "none.json")), "none.json cannot be read"),
        (generate.main, ("--chat", str(tmp_path / "bad.json")), "role 'robot' is none of"),
        (generate.main, (*chat, "--tools", str(tmp_path / "bad.json")), "tool 0 has no function"),
        (generate.main, (*chat, "--prompt", "x"), "not allowed with argument"),
        (generate.main, ("--tools", str(tmp_path / "good.json")), "belong to --chat"),
        (generate.main, ("--temperature", "-1"), "-1 is not a number that is 0 or more"),
        (generate.main, ("--top-p", "0"), "0 is not a number that is above 0, at most 1"),
        (generate.main, ("--max-tokens", "some"), "some is not a number that is 1 or more"),
        (generate.main, ("--prompt", "x " * 99), "leaves no room in the context"),
        (generate.main, ("model=kanana_2_tiny",), "the groups are those of the checkpoint"),
        (evaluate.main, ("--data", str(tmp_path / "none.txt")), "no such file, nor an indexed"),
        (evaluate.main, ("--data", str(tmp_path / "good.json")), "cannot read .json"),
        (evaluate.main, ("--data", "device=cpu"), "--data names no file"),
        (
            evaluate.main,
            ("--data", str(tmp_path / "one.txt"), "parallel.tensor_parallel_size=3"),
            "parallel.tensor_parallel_size",
        ),
    ]
    for tool, arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["tool", str(checkpoint), *arguments])
        try:
            code = tool()
        except SystemExit as exit:
            code = exit.code  # type: ignore[assignment]
        said = capsys.readouterr()
        assert code == 2, arguments
        assert message in said.err
        assert not said.out
