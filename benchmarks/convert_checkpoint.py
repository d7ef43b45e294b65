"""Converting a checkpoint of kanana_2_30b_a3b's shapes: memory and speed beside a plain copy.

python -m benchmarks.convert_checkpoint --name convert_checkpoint_cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_kanana.checkpoint.hugging_face.architecture import CONFIG_FILE, hugging_face_config
from megatron_kanana.checkpoint.hugging_face.groups import group_by_size
from megatron_kanana.checkpoint.hugging_face.safetensors_source import INDEX_FILE
from megatron_kanana.checkpoint.hugging_face.safetensors_writer import Entry
from megatron_kanana.checkpoint.hugging_face.weight_map import placements
from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.config.shipped import shipped_model

from .card import Row, write_card

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert_checkpoint.py"
SHARD_BYTES = 2 * 10**9


def main() -> None:
    """Measure each number of layers and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    options = parser.parse_args()
    rows: list[Row] = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure(layers, options.runs, Path(folder))
    print(write_card(options.name, rows).read_text())


def measure(layers: int, runs: int, folder: Path) -> list[Row]:
    """Convert there and back and compare, beside a plain copy, several times in turn."""
    model = dataclasses.replace(shipped_model("kanana_2_30b_a3b"), num_layers=layers)
    source, checkpoint, back = folder / "source", folder / "checkpoint", folder / "back"
    # In another process: memory that this one once used would count as its children's.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        num_bytes, largest = pool.submit(write_source, model, source).result()
    commands: dict[str, list[str | Path]] = {
        "to-megatron": ["--hf", source, "--out", checkpoint],
        "to-hf": ["--megatron", checkpoint, "--out", back],
        "verify": ["--hf", back, "--megatron", checkpoint],
    }
    rates: dict[str, list[float]] = {"copy": [], **{name: [] for name in commands}}
    peaks: dict[str, list[int]] = {name: [] for name in commands}
    for _ in range(runs):
        seconds, _ = run("sh", "-c", f"cp -r {source} {folder}/copy && sync -f {folder}")
        rates["copy"].append(num_bytes / seconds)
        shutil.rmtree(folder / "copy")
        for name, arguments in commands.items():
            seconds, peak = run(sys.executable, TOOL, name, *arguments)
            rates[name].append(num_bytes / seconds)
            peaks[name].append(peak)
        for written in (checkpoint, back):
            shutil.rmtree(written)
    what = f"{layers} layers, {num_bytes / 1e9:.1f} GB"
    copy = statistics.median(rates.pop("copy")) / 1e9
    rows = [Row(f"{what}: largest tensor", "GiB", largest / 2**30)]
    for name in commands:
        peak = max(peaks[name]) - largest
        rows.append(Row(f"{what}: {name}, peak memory above it", "GiB", peak / 2**30, runs=runs))
    for name in commands:
        rate = statistics.median(rates[name]) / 1e9
        rows.append(Row(f"{what}: {name}", "GB/s", rate, "cp and sync", copy, rate / copy, runs))
    return rows


def write_source(model: ModelSettings, folder: Path) -> tuple[int, int]:
    """Write random weights as Hugging Face's files; returns bytes of all and of the largest."""
    folder.mkdir()
    config = hugging_face_config(model, "bfloat16", end_of_text=None)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    entries = [Entry(p.hugging_face, torch.bfloat16, p.shape) for p in placements(model)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(group_by_size(entries, SHARD_BYTES)):
        file = f"model-{number:05d}.safetensors"
        tensors = {entry.name: torch.randn(entry.shape, dtype=entry.dtype) for entry in part}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    sizes = [entry.num_bytes for entry in entries]
    return sum(sizes), max(sizes)


def run(*command: str | Path) -> tuple[float, int]:
    """Run a command, which must succeed; its seconds and its peak of resident memory in bytes."""
    start = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return seconds, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
