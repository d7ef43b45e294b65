"""torchrun that leaves the signals of a scheduler to its processes, and passes their status on.

    python -m megatron_kanana.cluster.launch [torchrun's arguments]

SLURM signals every process of a job step. torchrun itself dies of SIGUSR1; here it ignores it,
and so do the processes it starts, until the run notes the signal (`training/interruption.py`).
torchrun also ends with 1 whatever its processes ended with; here it ends with the status of the
first one that failed.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_kanana.config.exit_status import SAVED_FOR_ANOTHER_START


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit status of its first process that failed, or 0."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != SAVED_FOR_ANOTHER_START:
            print(error, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
