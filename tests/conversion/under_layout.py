"""Loads converted checkpoints under a layout.

Arguments: JSON list of cases, then settings such as parallel.tensor_parallel_size=2. A case names
a checkpoint, and either `logits`, a file to write the logits of its `tokens` to, or `save`, a
folder to write the weights to as this layout holds them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana import device
from megatron_kanana.config import detect_environment, read_settings, saved_settings
from megatron_kanana.config.manifest import seal
from megatron_kanana.kernels.backend import REFERENCE
from tests.logits import logits_of


def run(case: dict[str, str], overrides: list[str]) -> None:
    """One case, on every process."""
    environment = detect_environment()
    common = ["device=cpu", "schedule.global_batch_size=4", "schedule.micro_batch_size=1"]
    checkpoint = Path(case["checkpoint"])
    settings = saved_settings(read_settings(checkpoint), [*common, *overrides], environment)
    where = device.prepare_device(settings, environment)
    if not dist.is_initialized():
        device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load_model, model_state
    from megatron_kanana.model.builder import build_model
    from megatron_kanana.model.megatron_config import transformer_config

    chunks = build_model(settings, transformer_config(settings, where), where, REFERENCE)
    load_model(chunks, checkpoint)
    if "logits" in case:
        result = logits_of(chunks, torch.load(case["tokens"]))
        if result is not None and dist.get_rank() == dist.get_world_size() - 1:
            torch.save(result, case["logits"])
    if "save" in case:
        folder = Path(case["save"])
        if dist.get_rank() == 0:
            folder.mkdir()
            for name in ("settings.yaml", "tokenizer.model"):
                if (checkpoint / name).is_file():
                    shutil.copyfile(checkpoint / name, folder / name)
        dist.barrier()
        save(model_state(chunks), folder)


def save(state: dict[str, Any], folder: Path) -> None:
    """Make a checkpoint of weights; every process must call this."""
    from megatron_kanana.checkpoint.parts import gather_parts, plan, write_buckets
    from megatron_kanana.checkpoint.torch_dist_blocks import COMMON_FILE, FORMAT, FORMAT_FILE

    planned = plan(state, folder)
    parts = gather_parts(write_buckets(planned.take_buckets()))
    if parts is not None:
        assert planned.metadata is not None
        planned.writer.finish(planned.metadata, [part.results for part in parts])
        torch.save(planned.common, folder / COMMON_FILE)
        (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))
        seal(folder)
    dist.barrier()


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        run(one, sys.argv[2:])
    device.destroy_process_groups()
