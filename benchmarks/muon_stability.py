"""What MuonClip is for: Muon at learning rates where attention logits explode, and at a usual one.

python -m benchmarks.muon_stability --name muon_stability_h100

Every run is the main job on the built-in text, from the same initial weights and with the same
samples; runs share one device, beside one another. Compared are AdamW, Muon with Newton-Schulz and
with Polar Express, and Muon with and without QK-Clip at rising learning rates.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kanana.training.records import read_records

from .card import RESULTS_DIR, Row, write_card

THRESHOLD = 100.0
LAST_STEPS = 20  # whose losses are averaged

# 150 million parameters, few and wide experts: what a device is busy with beside other runs.
MODEL = (
    "model.num_layers=8",
    "model.hidden_size=768",
    "model.num_attention_heads=12",
    "model.vocab_size=8192",
    "model.ffn_hidden_size=2304",
    "model.kv_lora_rank=256",
    "model.qk_nope_head_dim=64",
    "model.qk_rope_head_dim=32",
    "model.v_head_dim=64",
    "model.num_experts=8",
    "model.num_experts_per_token=2",
    "model.moe_ffn_hidden_size=768",
)
TINY = ("model.num_layers=2",)


@dataclass(frozen=True)
class Experiment:
    """One run: its name and what it sets."""

    name: str
    overrides: tuple[str, ...]


def experiments(
    usual_rate: float, adamw_rate: float, high_rates: Sequence[float]
) -> list[Experiment]:
    """All runs."""

    def muon(rate: float, threshold: float | None, method: str = "polar_express") -> Experiment:
        clip = "null" if threshold is None else str(threshold)
        words = ("Muon" if threshold is None else "MuonClip", method, f"{rate:g}")
        return Experiment(
            " ".join(words),
            (
                "optimizer=muon",
                f"optimizer.learning_rate={rate}",
                f"optimizer.orthogonalization={method}",
                f"optimizer.qk_clip_threshold={clip}",
            ),
        )

    adamw = ("optimizer=adamw", f"optimizer.learning_rate={adamw_rate}")
    return [
        Experiment(f"AdamW {adamw_rate:g}", adamw),
        muon(usual_rate, None, "newton_schulz"),
        muon(usual_rate, None),
        muon(usual_rate, THRESHOLD),
        *(muon(rate, threshold) for rate in high_rates for threshold in (None, THRESHOLD)),
    ]


def main() -> None:
    """Run everything, plot, and write the card."""
    options = parse_arguments()
    chosen = experiments(options.usual_rate, options.adamw_rate, options.high_rates)
    with tempfile.TemporaryDirectory() as folder:
        records = run_all(chosen, options, Path(folder))
    options.results_dir.mkdir(parents=True, exist_ok=True)
    plot(records, options.results_dir / f"{options.name}.png")
    print(write_card(options.name, card_rows(records), options.results_dir).read_text())


def parse_arguments() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card and the plot")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this on a CPU")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--usual-rate", type=float, default=2e-3)
    parser.add_argument("--adamw-rate", type=float, default=1e-3)
    parser.add_argument("--high-rates", type=float, nargs="+", default=[1e-2, 3e-2])
    parser.add_argument("--processes", type=int, default=8, help="at a time; 8 fit into 80 GB")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end every run after that")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    return parser.parse_args()


def run_all(
    chosen: Sequence[Experiment], options: argparse.Namespace, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Records of every run, by its name."""
    common = [
        *(TINY if options.tiny else MODEL),
        f"schedule.steps={options.steps}",
        f"schedule.warmup_steps={options.steps // 10}",
        f"schedule.decay_steps={options.steps // 5}",
        "schedule.minimum_learning_rate=0",
        "schedule.evaluation_interval=0"
        if options.tiny
        else f"schedule.evaluation_interval={options.steps}",
        "schedule.evaluation_batches=16",
        *([] if options.tiny else ["data.sequence_length=1024", "schedule.global_batch_size=8"]),
        "data.num_workers=0",
        f"data.cache_dir={folder / 'data'}",
        "checkpoint.save_interval=0",
        "logging.tensorboard=false",
        "logging.report=false",
        f"output_dir={folder}",
    ]
    # One process makes tokenizer and datasets before several look for them.
    start_one(Experiment("data", ("stop_after_step=1",)), common, folder).wait()
    deadline = time.monotonic() + 60 * options.minutes
    waiting = list(chosen)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < options.processes:
            experiment = waiting.pop(0)
            running[experiment.name] = start_one(experiment, common, folder)
        time.sleep(0.5)
        for name, process in list(running.items()):
            if time.monotonic() > deadline:
                process.terminate()
            if process.poll() is not None:
                del running[name]
                print(f"{name}: exit code {process.returncode}", flush=True)
                if process.returncode:
                    print((folder / f"{name}.log").read_text()[-2000:], flush=True)
    return {
        experiment.name: read_records(folder / experiment.name / "metrics.jsonl")
        for experiment in chosen
    }


def start_one(
    experiment: Experiment, common: Sequence[str], folder: Path
) -> subprocess.Popen[bytes]:
    """Start the main job; what it prints goes into a file beside its records."""
    overrides = [*common, f"run_name='{experiment.name}'", *experiment.overrides]
    log = (folder / f"{experiment.name}.log").open("wb")
    command = [sys.executable, "-m", "megatron_kanana.train", *overrides]
    return subprocess.Popen(command, stdout=log, stderr=log)


def card_rows(records: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Figures of every run; those of MuonClip beside those of Muon alone."""
    figures = {name: summary(run) for name, run in records.items() if run}
    rows = []
    for name, values in figures.items():
        peer = name.replace("MuonClip", "Muon")
        peers = figures.get(peer, {}) if peer != name else {}
        for what, (value, unit) in values.items():
            if what in peers:
                theirs = peers[what][0]
                ratio = theirs / value if value else None
                rows.append(Row(f"{name}: {what}", unit, value, peer, theirs, ratio))
            else:
                rows.append(Row(f"{name}: {what}", unit, value))
    return rows


def summary(run: Sequence[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """Figures of one run, with their units."""
    steps = [record for record in run if "loss" in record]
    held_out = [record["evaluation_loss"] for record in run if "evaluation_loss" in record]
    losses = [record["loss"] for record in steps[-LAST_STEPS:]]
    logits = [record["max_attention_logit"] for record in steps]
    figures = {
        "steps": (float(len(steps)), "1"),
        "loss, mean of the last steps": (sum(losses) / len(losses), "nats a token"),
        "largest attention logit of the run": (max(logits), "1"),
        "largest attention logit at the end": (logits[-1], "1"),
        "times a head was scaled down": (float(sum(r["clipped_heads"] for r in steps)), "1"),
    }
    if held_out:
        figures["held-out loss"] = (held_out[-1], "nats a token")
    return figures


def plot(records: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss and largest attention logit over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, logits) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    for name, run in records.items():
        steps = [record for record in run if "loss" in record]
        style = "--" if name.startswith("Muon ") else "-"
        numbers = [record["step"] for record in steps]
        losses.plot(numbers, [record["loss"] for record in steps], style, label=name)
        logits.plot(numbers, [record["max_attention_logit"] for record in steps], style, label=name)
    losses.set_ylabel("loss (nats a token)")
    losses.set_ylim(top=math.log(8192) + 1)
    logits.set_ylabel("largest attention logit")
    logits.set_yscale("log")
    logits.axhline(THRESHOLD, color="black", linewidth=0.8, linestyle=":")
    for axes in (losses, logits):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    logits.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
