"""What a newcomer gets: the default run learns, and leaves everything it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_kanana.config import read_settings
from megatron_kanana.data.builtin import language_samples
from megatron_kanana.data.documents import read_documents
from tests.conversion.test_round_trip import convert
from tests.launch import Finished, run_python

VOCAB_SIZE = 4096


class DefaultRun:
    """Folder, output and records of a default run."""

    def __init__(self, folder: Path, finished: Finished) -> None:
        self.finished = finished
        self.run_dir = folder / "kanana_2_tiny"
        self.checkpoint = self.run_dir / "checkpoints" / "step_00000120"
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.steps = [record for record in self.records if "loss" in record]


def default_run(folder: Path, device: str, processes: int) -> DefaultRun:
    """Run the main job with its default settings."""
    finished = run_python(
        *("-m", "megatron_kanana.train", f"device={device}"),
        f"output_dir={folder}",
        f"data.cache_dir={folder / 'data'}",
        processes=processes,
        timeout=400,
        anew=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return DefaultRun(folder, finished)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> DefaultRun:
    """The default run on two processes of this machine's CPU."""
    return default_run(tmp_path_factory.mktemp("default"), "cpu", 2)


@pytest.mark.timeout(500)
def test_loss_falls_from_that_of_guessing_below_sixty_percent(run: DefaultRun) -> None:
    losses = [record["loss"] for record in run.steps]
    assert [record["step"] for record in run.steps] == list(range(1, 121))
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)
    assert sum(losses[-10:]) / 10 < 0.6 * math.log(VOCAB_SIZE)


def test_held_out_loss_falls_too(run: DefaultRun) -> None:
    held_out = [record["evaluation_loss"] for record in run.records if "evaluation_loss" in record]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0] < math.log(VOCAB_SIZE)
    assert held_out[1] < 0.65 * math.log(VOCAB_SIZE)


def test_every_step_is_measured(run: DefaultRun) -> None:
    for record in run.steps:
        assert 0.0 < record["grad_norm"] < 100.0
        assert record["tokens_per_second"] > 0
        assert len(record["max_attention_logits"]) == 4
        assert record["max_attention_logit"] == max(record["max_attention_logits"])
        assert set(record["expert_loads"]) == {"2", "3", "4"}  # the first layer is dense
        for load in record["expert_loads"].values():
            assert sum(load) == 16 * 128 * 4  # sequences x length x experts a token
    violations = [record["max_violation"] for record in run.steps]
    assert max(violations[:20]) > 1.0 > max(violations[-10:])  # the expert bias balances
    assert run.steps[9]["learning_rate"] == pytest.approx(3e-3)
    assert run.steps[0]["learning_rate"] == pytest.approx(3e-4)
    assert run.steps[-1]["learning_rate"] == pytest.approx(3e-4)


def test_checkpoint_tensorboard_and_report_are_there(run: DefaultRun) -> None:
    names = sorted(entry.name for entry in run.checkpoint.parent.iterdir())
    assert names == ["step_00000100", "step_00000120"]
    assert read_settings(run.checkpoint)["model"]["name"] == "kanana_2_tiny"
    events = EventAccumulator(str(run.run_dir / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 120
    page = (run.run_dir / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "Text sample" in page


def test_what_is_printed_is_progress_and_nothing_else(run: DefaultRun) -> None:
    """One line now and then with everything in it, the sample, and where things are."""
    assert "step 120/120  loss " in run.finished.stdout
    for part in ("grad norm", "lr ", "tokens/s", "max logit", "MaxVio", "left 0:00"):
        assert part in run.finished.stdout
    assert "text sample:\ndef __init__(self" in run.finished.stdout
    assert f"report: {run.run_dir / 'report.html'}" in run.finished.stdout
    noise = [
        line
        for line in run.finished.stderr.splitlines()
        if "Warning" in line or "Error" in line or "Traceback" in line
    ]
    assert not noise, run.finished.stderr


def test_generate_continues_a_text_in_another_layout(run: DefaultRun) -> None:
    """On one process it answers in the last of the scripts that test_examples.py runs."""
    finished = run_python(
        *("tools/generate.py", str(run.checkpoint), "--prompt", "import ", "--max-tokens", "12"),
        *("device=cpu", "parallel.tensor_parallel_size=2"),
        processes=2,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("import ")
    assert len(finished.stdout) > len("import \n")


def test_generate_refuses_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    finished = run_python("tools/generate.py", str(tmp_path))
    assert finished.returncode == 2
    assert "name a step_… folder" in finished.stderr


def test_trained_model_has_the_same_perplexity_in_transformers(
    run: DefaultRun, tmp_path: Path
) -> None:
    """Exported, with its tokenizer, and measured by an independent implementation."""
    exported, text = tmp_path / "exported", tmp_path / "held_out.txt"
    documents = [text.strip("\n") for text in list(language_samples())[:24]]
    text.write_text("\n\n".join(documents))
    assert convert("to-hf", "--megatron", run.checkpoint, "--out", exported) == 0
    finished = run_python(
        *("tools/evaluate.py", str(run.checkpoint), "--data", str(text), "--json", "device=cpu"),
        *("--batch-size", "8"),
    )
    assert finished.returncode == 0, finished.stderr
    ours = json.loads(finished.stdout)["all"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    ids: list[int] = []
    for document in read_documents(text):
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    losses = []
    for start in range(0, len(ids), 128):  # windows as long as those of the training
        window = torch.tensor([ids[start : start + 128]])
        if window.shape[1] > 1:
            with torch.no_grad():
                logits = model(window).logits[0, :-1].double()
            losses.append(F.cross_entropy(logits, window[0, 1:], reduction="none"))
    theirs = torch.cat(losses)
    assert ours["predicted"] == len(theirs)
    assert ours["loss"] == pytest.approx(float(theirs.mean()), rel=1e-4)
    assert ours["perplexity"] == pytest.approx(math.exp(theirs.mean()), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(500)
def test_default_run_learns_in_bf16_on_cuda(tmp_path: Path) -> None:
    run = default_run(tmp_path, "cuda", 1)
    assert "cuda:0, bf16" in run.finished.stdout + run.finished.stderr
    assert run.steps[-1]["loss"] < 0.6 * math.log(VOCAB_SIZE)
