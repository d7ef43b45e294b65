"""The default run from start to end on this machine: does it learn, and how fast.

python -m benchmarks.train_tiny --name train_tiny_cpu
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.training.records import read_records

from .card import Row, write_card


def main() -> None:
    """Train, check that the run left what it should, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--results-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    settings = load_settings([], Environment())
    with tempfile.TemporaryDirectory() as folder:
        seconds = train(options.processes, Path(folder))
        run_dir = Path(folder) / settings.run_name
        records = read_records(run_dir / "metrics.jsonl")
        assert (run_dir / "report.html").is_file()
        assert list((run_dir / "tensorboard").glob("events.*"))
        assert (run_dir / "checkpoints" / f"step_{settings.schedule.steps:08d}").is_dir()
    steps = [record for record in records if "loss" in record]
    held_out = [record["evaluation_loss"] for record in records if "evaluation_loss" in record]
    uniform = math.log(settings.model.vocab_size)
    rate = statistics.median(record["tokens_per_second"] for record in steps)
    rows = [
        Row("ln(vocabulary)", "nats a token", uniform),
        Row("loss at step 1", "nats a token", steps[0]["loss"]),
        Row(f"loss at step {steps[-1]['step']}", "nats a token", steps[-1]["loss"]),
        Row("last loss / ln(vocabulary)", "ratio", steps[-1]["loss"] / uniform),
        Row("held-out loss at the end", "nats a token", held_out[-1]),
        Row("throughput, median of steps", "tokens/s", rate),
        Row("whole job, tokenizer, datasets and report included", "s", seconds),
    ]
    print(write_card(options.name, rows, options.results_dir).read_text())


def train(processes: int, output_dir: Path) -> float:
    """Run the main job; returns its seconds."""
    start = time.monotonic()
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    folders = [f"output_dir={output_dir}", f"data.cache_dir={output_dir}/data"]
    job = ["-m", "megatron_kanana.train", *folders]
    subprocess.run([sys.executable, "-m", *launcher, *job], check=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
