"""What a run leaves to look at: metrics.jsonl, TensorBoard, report, MaxVio."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.config.ledger import Ledger
from megatron_kanana.training.metrics import StepMetrics, max_violation
from megatron_kanana.training.perplexity import HeldOutLoss
from megatron_kanana.training.records import Recorder, read_records
from megatron_kanana.training.report import write_report


def ledger(step: int) -> Ledger:
    """A quarter of the tokens are Korean; an earlier run had other sources."""
    return Ledger(step, 64, {"korean": 16 * step, "code": 48 * step}, {"code": 1000, "web": 500})


def record(
    run_dir: Path, first: int, last: int, *, offset: float = 0.0, mtp_losses: tuple[float, ...] = ()
) -> None:
    """Record steps first..last, as a run that starts at `first` - 1 would."""
    recorder = Recorder(run_dir, first - 1, 10, tensorboard=True)
    for step in range(first, last + 1):
        metrics = StepMetrics(
            loss=10.0 - step + offset,
            max_logits=[1.0 * step, 2.0],
            expert_loads={2: [3.0, 1.0, 2.0, 2.0]},
            mtp_losses=list(mtp_losses),
        )
        recorder.record_step(
            step, ledger(step), metrics, grad_norm=0.5, learning_rate=1e-3, tokens_per_second=9
        )
    sets = {"ko": HeldOutLoss(documents=2, tokens=60, num_bytes=90, predicted=58, nats=58 * 3.5)}
    recorder.record_evaluation(last, 64 * last, 4.25, None, sets)
    recorder.close()


def test_max_violation_is_the_excess_of_the_busiest_expert() -> None:
    assert max_violation([3.0, 1.0, 2.0, 2.0]) == pytest.approx(0.5)
    assert max_violation([5.0, 5.0]) == 0.0
    assert max_violation([8.0, 0.0, 0.0, 0.0]) == pytest.approx(3.0)
    assert max_violation([0.0, 0.0]) == 0.0


def test_a_resumed_run_writes_over_the_steps_it_repeats(tmp_path: Path) -> None:
    record(tmp_path, 1, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a crash in the middle of a line
    record(tmp_path, 5, 10, offset=100.0)
    records = read_records(tmp_path / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in records if "loss" in line}
    assert losses == {step: 10.0 - step + (100.0 if step > 4 else 0.0) for step in range(1, 11)}

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 11))
    assert scalars[-1].value == pytest.approx(100.0)
    assert {
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens_per_second",
        "train/max_attention_logit",
        "train/max_violation",
        "max_attention_logit/layer_2",
        "max_violation/layer_2",
        "evaluation/loss",
        "evaluation_bits_per_byte/ko",
        "source_tokens/korean",
    } <= set(events.Tags()["scalars"])


def test_tokens_by_source_and_held_out_sets_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 1, 2)
    assert "held-out loss 4.2500; ko 3.5000" in capsys.readouterr().out
    *steps, evaluation = read_records(tmp_path / "metrics.jsonl")
    assert [step["tokens"] for step in steps] == [64, 128]
    assert steps[1]["source_tokens"] == {"korean": 32, "code": 96}
    ko = evaluation["evaluation_sets"]["ko"]
    assert ko["loss"] == pytest.approx(3.5)
    assert ko["perplexity"] == pytest.approx(math.exp(3.5))
    assert ko["bits_per_byte"] == pytest.approx(3.5 / math.log(2) * 60 / 90)


def test_a_line_of_progress_tells_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 1, 1)
    line = capsys.readouterr().out.splitlines()[0]
    for part in ("step 1/10", "loss 9.0000", "grad norm 0.500", "lr 1.00e-03", "9 tokens/s"):
        assert part in line
    assert "MTP" not in line
    assert re.search(r"max logit 2\.00  MaxVio 0\.50  left \d+:\d\d$", line)


def test_losses_of_multi_token_prediction_are_recorded_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 1, 1, mtp_losses=(9.5, 9.75))
    assert "loss 9.0000  MTP 9.5000 9.7500  grad norm" in capsys.readouterr().out
    assert read_records(tmp_path / "metrics.jsonl")[0]["mtp_losses"] == [9.5, 9.75]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/mtp_loss_2")[0].value == pytest.approx(9.75)


@pytest.mark.parametrize("mtp_losses", [(), (9.5, 9.75)])
def test_the_report_shows_curves_sample_and_settings(
    mtp_losses: tuple[float, ...], tmp_path: Path
) -> None:
    record(tmp_path, 1, 10, mtp_losses=mtp_losses)
    settings = dataclasses.asdict(load_settings([], Environment()))
    path = tmp_path / "report.html"
    records = read_records(tmp_path / "metrics.jsonl")
    write_report(path, records, settings, "def <script>()", "runs/x/step_00000010", ledger(10))
    page = path.read_text()
    assert "def &lt;script&gt;()" in page
    assert "9.0000 to 0.0000" in page
    assert "4.2500" in page
    assert "runs/x/step_00000010" in page
    assert "kv_lora_rank: 64" in page
    assert "<td>code</td><td>480 (75.00%), and 1,000 in earlier runs</td>" in page
    assert "<td>korean</td><td>160 (25.00%)</td>" in page
    assert "<td>web</td><td>0 (0.00%), and 500 in earlier runs</td>" in page
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert encoded is not None
    picture = Image.open(io.BytesIO(base64.b64decode(encoded.group(1))))
    assert picture.size[0] > 1000
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50  # curves, not a blank page
