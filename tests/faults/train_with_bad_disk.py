"""The main job, with something happening to its disk or its writers in the middle.

Argument: JSON, a list of jobs, which run one after another in the same processes. A job has a port
to meet at; arguments of the main job, where {rank} stands for the process's rank; events by step,
each of which happens before its step; and perhaps a small disk to be mounted, with a folder that
gets what is on it at the end. Each job's status, and what its first rank said, is printed as a line
of JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_kanana import train

Event = tuple[str, str]


def free(path: str) -> None:
    """Delete a file, by which the disk has room again."""
    Path(path).unlink()


def fill(path: str) -> None:
    """Leave so many bytes of the disk free: `path:bytes`."""
    name, left = path.rsplit(":", 1)
    size = shutil.disk_usage(Path(name).parent).free - int(left)
    with Path(name).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def kill_writer(rank: str) -> None:
    """On this rank, have writers of checkpoints wait, and kill the first."""
    from megatron_kanana.checkpoint import writer

    write, start = vars(writer)["write_buckets"], vars(writer)["Work"]
    if os.environ.get("RANK", "0") != rank:
        return

    def slowly(*arguments: Any) -> Any:
        time.sleep(60)

    def started(*arguments: Any, **options: Any) -> Any:
        work = start(*arguments, **options)
        os.kill(work._process.pid, signal.SIGKILL)
        vars(writer).update(write_buckets=write, Work=start)
        return work

    vars(writer).update(write_buckets=slowly, Work=started)


def read_only(disk: str) -> None:
    """Have the disk refuse to be written to."""
    mount("-o", "remount,ro", disk)


def writable(disk: str) -> None:
    """Have the disk take files again."""
    mount("-o", "remount,rw", disk)


def mount(*arguments: str) -> None:
    """The command of that name."""
    subprocess.run(["mount", *arguments], check=True)


EVENTS: dict[str, Callable[[str], None]] = {
    "free": free,
    "fill": fill,
    "kill writer": kill_writer,
    "read only": read_only,
    "writable": writable,
}


def main(jobs: Sequence[dict[str, Any]]) -> None:
    """Run the jobs."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    rank = os.environ.get("RANK", "0")
    logging.getLogger().setLevel(logging.INFO if rank == "0" else logging.WARNING)
    for job in jobs:
        os.environ["MASTER_PORT"] = str(job["port"])
        disk = job.get("disk")
        if disk is not None:
            mount("-t", "tmpfs", "-o", "size=64m", "none", disk)
        with tempfile.TemporaryFile("w+") as file:
            handler = logging.StreamHandler(file)
            logging.getLogger().addHandler(handler)
            with happening(job["events"]), contextlib.redirect_stderr(file):
                status = train.main([word.replace("{rank}", rank) for word in job["arguments"]])
            logging.getLogger().removeHandler(handler)
            file.seek(0)
            said = file.read()
        if disk is not None:
            shutil.copytree(disk, job["kept"])
            subprocess.run(["umount", disk], check=True)
        if rank == "0":
            print(json.dumps({"status": status, "said": said}), flush=True)
        clean_up()


@contextlib.contextmanager
def happening(events: dict[str, Event]) -> Any:
    """Let the events happen before their steps."""
    from megatron_kanana.checkpoint import writer
    from megatron_kanana.training import loop

    train_step, kept = vars(loop)["train_step"], dict(vars(writer))

    def step(run: Any, iterators: Any) -> Any:
        if event := events.get(str(run.step + 1)):
            EVENTS[event[0]](event[1])
        return train_step(run, iterators)

    vars(loop).update(train_step=step)
    try:
        yield
    finally:
        vars(loop).update(train_step=train_step)
        vars(writer).update(write_buckets=kept["write_buckets"], Work=kept["Work"])


def clean_up() -> None:
    """What a process that ends would leave to the system."""
    import torch.distributed as dist
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from megatron_kanana import device

    unset_num_microbatches_calculator()
    if dist.is_initialized():
        device.destroy_process_groups()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
