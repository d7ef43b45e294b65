"""Trainings, and logits of checkpoints, one after another in the same processes.

Argument: a JSON file, a list of jobs (`Job`). Each job that ends leaves an empty file, and waits
before for that of the job whose checkpoint it begins with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.multi_gpu.reordered import reordered
from benchmarks.multi_gpu.thresholds import recorded_logits
from megatron_kanana import device, train
from megatron_kanana.config import detect_environment, load_settings
from megatron_kanana.config.saved_model import settings_of_saved_model
from tests.logits import logits_of

DONE, FAILED = "done", "failed"
"""Files in a job's folder that tell how it ended."""


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
        folder: of what it writes.
        ports: for the processes to meet at, two.
        after: folder of the job that must have ended before; None for none.
        training: arguments of the main job; without any, none.
        seed: of the order of summation; None leaves it.
        logits: that are computed after the training; None for none.
    """

    folder: str
    ports: list[int]
    after: str | None = None
    training: list[str] = field(default_factory=list)
    seed: int | None = None
    logits: LogitsJob | None = None


def main(words: list[dict[str, Any]]) -> int:
    """Do the jobs until one fails; returns the main job's exit code, or 0."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the job before
    jobs = [
        Job(**{**each, "logits": each["logits"] and LogitsJob(**each["logits"])}) for each in words
    ]
    import_all(jobs)
    for job in jobs:
        folder = Path(job.folder)
        if job.after is not None:
            wait_for(Path(job.after))
        with reordered(job.seed), recorded_logits(folder / "heads.pt" if job.training else None):
            os.environ["MASTER_PORT"] = str(job.ports[0])
            if job.training and (code := train.main(job.training)):
                return code
        forget_run()
        with reordered(job.seed):
            if job.logits is not None:
                os.environ["MASTER_PORT"] = str(job.ports[1])
                write_logits(job.logits)
        if os.environ.get("RANK", "0") == "0":
            (folder / DONE).touch()
    return 0


def import_all(jobs: list[Job]) -> None:
    """What a training imports, on its device: before the first wait, as it takes long."""
    for job in jobs:
        if job.training:
            options = train.parse_arguments(job.training)
            environment = detect_environment()
            words = (options.overrides, environment, options.config_dir)
            device.prepare_device(load_settings(*words, with_files=False), environment)

            import megatron_kanana.training.loop  # noqa: F401

            return


def wait_for(folder: Path) -> None:
    """Wait until the job of a folder has ended.

    Raises:
        RuntimeError: it failed.
    """
    while not (folder / DONE).exists():
        if (folder / FAILED).exists():
            raise RuntimeError(f"{folder.name} was not done")
        time.sleep(0.05)


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
    forget_run()
    torch.distributed.barrier()
    device.destroy_process_groups()


def forget_run() -> None:
    """So that another run can have other batches and layers."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    unset_num_microbatches_calculator()
    get_moe_layer_wise_logging_tracker().clear()
    MTPLossLoggingHelper.tracker.clear()


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
