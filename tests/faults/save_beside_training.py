"""Saves a run in the background while it goes on training, beside a save that training waits for.

Arguments: a folder, and those of the main job. The folder gets the checkpoints `blocking`,
`background` and `later`: the first two of one step, one waited for, the other written while the
weights change; the third of a later step. Printed is a line of JSON with `trained_seconds`, from
the begin of the background save to the last step, `written_seconds`, to its end, and
`page_locked_is_shared`, whether a forked process sees what is written later into memory whose pages
are locked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_kanana import device
from megatron_kanana.config import detect_environment, load_settings

STEPS = 3
"""Before the saves, and while one goes on."""

DELAY_SECONDS = 4.0
"""The process that writes in the background waits so long before it reads what it writes."""


def main(folder: Path, arguments: list[str]) -> None:
    """Train, save in both ways, train on, and save again."""
    options = argparse.ArgumentParser()
    options.add_argument("--config-dir")
    options.add_argument("overrides", nargs="*")
    words = options.parse_args(arguments)
    environment = detect_environment()
    settings = load_settings(words.overrides, environment, words.config_dir)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint import writer
    from megatron_kanana.training.run import build_run, training_data
    from megatron_kanana.training.step import train_step

    def writer_to(name: str, *, asynchronous: bool) -> writer.CheckpointWriter:
        checkpoint = dataclasses.replace(
            settings.checkpoint, directory=str(folder / name), asynchronous=asynchronous
        )
        return writer.CheckpointWriter(
            dataclasses.replace(settings, checkpoint=checkpoint), where.torch_device
        )

    run = build_run(settings, where)
    iterators, _ = training_data(run)
    for _ in range(STEPS):
        train_step(run, iterators)
    writer_to("blocking", asynchronous=False).save(run)

    write_buckets = vars(writer)["write_buckets"]

    def write_late(*buckets: Any) -> Any:
        time.sleep(DELAY_SECONDS)
        return write_buckets(*buckets)

    vars(writer)["write_buckets"] = write_late
    background = writer_to("background", asynchronous=True)
    begin = time.monotonic()
    background.save(run)
    vars(writer)["write_buckets"] = write_buckets
    for _ in range(STEPS):
        train_step(run, iterators)
        if where.is_cuda:
            overwrite_free_memory(run)
    trained = time.monotonic() - begin
    background.finish()
    written = time.monotonic() - begin
    writer_to("later", asynchronous=False).save(run)
    told = {"trained_seconds": trained, "written_seconds": written}
    print(json.dumps({**told, "page_locked_is_shared": where.is_cuda and is_shared()}))
    device.destroy_process_groups()


def overwrite_free_memory(run: Any) -> None:
    """Take page-locked memory of all sizes that copies of the weights had, and write over it."""
    sizes = {parameter.numel() for chunk in run.chunks for parameter in chunk.parameters()}
    kept = [
        torch.empty(size * width, dtype=torch.uint8, pin_memory=True).fill_(0xFF)
        for size in sizes
        for width in (2, 4)
        for _ in range(8)
    ]
    torch.cuda.synchronize()
    del kept


def is_shared() -> bool:
    """Whether page-locked memory is one with that of a forked process."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8, pin_memory=True)
    numbers = memory.numpy()
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        os._exit(int(numbers[0]))
    numbers[0] = 1
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
