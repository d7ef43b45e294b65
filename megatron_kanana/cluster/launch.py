"""torchrun that leaves the signals of a scheduler to its processes, and passes their status on.

    python -m megatron_kanana.cluster.launch [torchrun's arguments]

SLURM signals every process of a job step. torchrun itself dies of SIGUSR1; here it ignores it,
and so do the processes it starts, until the run notes the signal (`training/interruption.py`).
torchrun also ends with 1 whatever its processes ended with; here it ends with the status of the
first one that failed.

With `--max-restarts`, processes that die are started again, all together, but not those that left
on purpose. On CPUs, `--start-method fork --run-path megatron_kanana/train.py` forks them from this
one, which has loaded the libraries already: a restart then takes no new start of Python.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from typing import Any

import torch
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from megatron_kanana.config.exit_status import (
    LAUNCH_TIME,
    SAVED_FOR_ANOTHER_START,
    START,
    WITHOUT_RESTART,
    WRONG_CONFIGURATION,
)

SECONDS_TO_SAVE = 600
"""After SIGTERM to torchrun, which hands it on; torchrun's own 30 are short for a checkpoint."""


class Agent(LocalElasticAgent):
    """torchrun's part on a node: starts the processes, and starts them again if one dies."""

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        if worker_group.spec.rdzv_handler.get_backend() == "static":
            return  # its store is that of the start before
        group: Any = worker_group
        if group.group_rank == 0:
            group.store.set(START, uuid.uuid4().hex)
        os.environ[START] = group.store.get(START).decode()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed() and self._remaining_restarts:
            rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
            if failure.exitcode in WITHOUT_RESTART:
                self._remaining_restarts = 0
            else:
                print(
                    f"rank {rank} ended with {_ending(failure)}; all start again"
                    f" ({self._remaining_restarts} of {worker_group.spec.max_restarts} restarts"
                    " were left)",
                    file=sys.stderr,
                    flush=True,
                )
        return result


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit status of its first process that failed, or 0."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ[LAUNCH_TIME] = str(time.time())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    vars(api)["LocalElasticAgent"] = Agent  # torchrun has no option for it
    options = run.parse_args(arguments)
    if options.start_method == "fork":
        if torch.cuda.is_available():
            print("--start-method fork: CUDA does not bear it", file=sys.stderr)
            return WRONG_CONFIGURATION
        _load_libraries()
    try:
        run.run(options)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != SAVED_FOR_ANOTHER_START:
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _load_libraries() -> None:
    """Import what takes long and changes nothing of what the run patches (`device/patches.py`)."""
    import torch._inductor.compile_fx
    import torch.distributed.checkpoint
    import torch.distributed.tensor  # noqa: F401


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return signal.Signals(-failure.exitcode).name
    return f"status {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main())
