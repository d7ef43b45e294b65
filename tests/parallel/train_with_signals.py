"""As train_in_turn.py, with a signal to the last process in the middle of a step of some runs.

Arguments: a JSON of {run: [step, signal, exit status, port]}, and that of train_in_turn.py. A run
that leaves with the status is started again, with its processes meeting at the port.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from megatron_kanana import device, train
from tests import train_in_turn

Signals = dict[str, tuple[int, int, int, int]]


def main(signals: Signals, jobs: list[tuple[int, list[str]]]) -> int:
    """Run the jobs; returns the status of the first that fails, or 0."""
    initialize, run_job = device.initialize_process_groups, train.main

    def initialize_and_watch(*arguments: Any) -> None:
        initialize(*arguments)
        watch(signals)

    def run_to_its_end(arguments: list[str] | None = None) -> int:
        status = run_job(arguments)
        ports = [port for _, _, of_run, port in signals.values() if of_run == status]
        if not ports:
            return status
        os.environ["MASTER_PORT"] = str(ports[0])
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

        unset_num_microbatches_calculator()
        return run_job(arguments)

    vars(device)["initialize_process_groups"] = initialize_and_watch
    vars(train)["main"] = run_to_its_end
    return train_in_turn.main(jobs)


def watch(signals: Signals) -> None:
    """Signal the last process in the middle of the steps named."""
    import torch.distributed as dist

    from megatron_kanana.training import step as of_training

    forward_step = vars(of_training)["_forward_step"]

    def watching(run: Any, *arguments: Any) -> Any:
        step, number, _, _ = signals.get(run.settings.run_name, (0, 0, 0, 0))
        if run.step + 1 == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), number)
        return forward_step(run, *arguments)

    vars(of_training)["_forward_step"] = watching


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), json.loads(sys.argv[2])))
