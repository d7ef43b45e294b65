"""Whether two versions of megatron-core train alike: the same runs on both, step by step.

python3.12 -m pip install --no-deps --target FOLDER megatron-core==0.16.1
python3.12 -m benchmarks.megatron_versions --name megatron_versions_cpu --other FOLDER

Before, the first two commands of docs/fine_tuning.md write data/tool_calls.
The installed megatron-core is compared with the one in FOLDER; Python, torch and all else are the
same. Each case is a tiny model, from the same seed, on the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card import RESULTS_DIR, Row, write_card

SIZES = ("schedule.global_batch_size=8", "schedule.micro_batch_size=2", "data.sequence_length=128")
QUIET = ("checkpoint.save_interval=0", "logging.tensorboard=false", "logging.report=false")


@dataclass(frozen=True)
class Case:
    """One layout and what is trained in it.

    Attributes:
        name: of the case in the card.
        overrides: of the default run.
        processes: of the run.
    """

    name: str
    overrides: tuple[str, ...]
    processes: int = 1


CASES = (
    Case("fp32, AdamW", ()),
    Case("bf16, AdamW", ("precision=bf16",)),
    Case(
        "bf16, Muon, low-rank queries", ("precision=bf16", "optimizer=muon", "model.q_lora_rank=48")
    ),
    Case("full recompute, two MTP layers", ("parallel.recompute=full", "model.num_mtp_layers=2")),
    Case(
        "tensor parallel, one MTP layer",
        ("parallel.tensor_parallel_size=2", "model.num_mtp_layers=1"),
        processes=2,
    ),
    Case(
        "supervised fine-tuning, one MTP layer",
        ("experiment=kanana_2_tiny_sft", "model.num_mtp_layers=1", "data.sequence_length=512"),
    ),
    Case(
        "pipeline of two, each in two stages",
        ("parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_stages=2"),
        processes=2,
    ),
    Case(
        "experts over two, Muon",
        ("parallel.expert_parallel_size=2", "optimizer=muon"),
        processes=2,
    ),
)


def main(arguments: list[str] | None = None) -> None:
    """Train every case on both versions and write the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--other", type=Path, required=True, help="folder of the other version")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args(arguments)
    other = options.other.resolve()
    peer = f"megatron-core {version(other)}"
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            ours = train(case, Path(folder) / "ours", options.steps)
            theirs = train(case, Path(folder) / "theirs", options.steps, other)
        rows += compare(case, ours, theirs, peer)
        print(*rows[-2:], sep="\n", flush=True)
    note = f"ours is on the megatron-core of `versions`; {options.steps} steps of each case."
    print(write_card(options.name, rows, options.results_dir, [note]))


def train(
    case: Case, folder: Path, steps: int, megatron_core: Path | None = None
) -> list[dict[str, Any]]:
    """Records of each step of a run.

    Args:
        megatron_core: folder of the version to use; None for the installed one.
    """
    schedule = (f"schedule.steps={steps}", f"schedule.decay_steps={steps // 4}")
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}")
    command = [sys.executable, "-m", *launcher, "-m", "megatron_kanana.train"]
    command += [*schedule, *SIZES, *QUIET, *case.overrides, f"output_dir={folder}", "run_name=run"]
    subprocess.run(command, check=True, env=environment(megatron_core))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def environment(megatron_core: Path | None) -> dict[str, str]:
    """Variables of a process that is to find the megatron-core in a folder first."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if megatron_core is not None:
        paths = [str(megatron_core), *filter(None, [variables.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return variables


def version(megatron_core: Path) -> str:
    """The version that such a process imports."""
    code = "import megatron.core; print(megatron.core.__version__)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    variables = environment(megatron_core)
    run = subprocess.run(command, check=True, env=variables, stdout=subprocess.PIPE, text=True)
    return run.stdout.strip()


def compare(
    case: Case, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], peer: str
) -> list[Row]:
    """The last losses, and the largest difference of any step's losses and norms."""
    assert len(ours) == len(theirs)
    pairs = list(zip(ours, theirs, strict=True))
    losses = max(
        abs(a - b)
        for our, their in pairs
        for a, b in zip(_losses(our), _losses(their), strict=True)
    )
    norms = max(abs(our["grad_norm"] / their["grad_norm"] - 1.0) for our, their in pairs)
    last = (ours[-1]["loss"], theirs[-1]["loss"])
    return [
        Row(f"{case.name}: loss of step {len(pairs)}", "nats", last[0], peer, last[1]),
        Row(f"{case.name}: largest difference of a loss", "nats", losses),
        Row(f"{case.name}: largest difference of a gradient norm", "of the norm", norms),
    ]


def _losses(record: dict[str, Any]) -> list[float]:
    return [record["loss"], *record["mtp_losses"]]


if __name__ == "__main__":
    main()
