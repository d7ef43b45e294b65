"""Trainings, and logits of checkpoints, one after another in the same processes.

Argument: a JSON file, a list of jobs (`Job`). Each job that ends leaves an empty file.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.multi_gpu.reordered import reordered
from megatron_kanana import device, train
from megatron_kanana.config import detect_environment
from megatron_kanana.config.saved_model import settings_of_saved_model
from tests.logits import logits_of


@dataclass(frozen=True)
class LogitsJob:
    """Logits of a checkpoint.

    Attributes:
        checkpoint: its folder.
        tokens: file of int64 [batch, sequence].
        output: file of fp32 [batch, sequence, vocabulary] to write.
        overrides: layout and precision.
    """

    checkpoint: str
    tokens: str
    output: str
    overrides: list[str]


@dataclass(frozen=True)
class Job:
    """A training, logits, or both.

    Attributes:
        done: file that tells of the end.
        ports: for the processes to meet at, two.
        training: arguments of the main job; without any, none.
        seed: of the order of summation; None leaves it.
        logits: that are computed after the training; None for none.
    """

    done: str
    ports: list[int]
    training: list[str] = field(default_factory=list)
    seed: int | None = None
    logits: LogitsJob | None = None


def main(jobs: list[dict[str, Any]]) -> int:
    """Do the jobs until one fails; returns the main job's exit code, or 0."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the job before
    for words in jobs:
        of_logits = words["logits"]
        job = Job(**{**words, "logits": of_logits and LogitsJob(**of_logits)})
        with reordered(job.seed):
            os.environ["MASTER_PORT"] = str(job.ports[0])
            if job.training and (code := train.main(job.training)):
                return code
            forget_microbatches()
            if job.logits is not None:
                os.environ["MASTER_PORT"] = str(job.ports[1])
                write_logits(job.logits)
        if os.environ.get("RANK", "0") == "0":
            Path(job.done).touch()
    return 0


def write_logits(job: LogitsJob) -> None:
    """Logits of a checkpoint, by the last process, which has the output layer in every layout."""
    environment = detect_environment()
    tokens = torch.load(job.tokens)
    length = f"data.sequence_length={tokens.shape[1]}"
    settings = settings_of_saved_model(Path(job.checkpoint), [*job.overrides, length], environment)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load_model
    from megatron_kanana.training.run import build_bare_model

    model = build_bare_model(settings, where)
    load_model(model.chunks, Path(job.checkpoint))
    logits = logits_of(model.chunks, tokens)
    if logits is not None and environment.rank == environment.world_size - 1:
        torch.save(logits, job.output)
    forget_microbatches()
    torch.distributed.barrier()
    device.destroy_process_groups()


def forget_microbatches() -> None:
    """So that another run can have other batches."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    unset_num_microbatches_calculator()


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
