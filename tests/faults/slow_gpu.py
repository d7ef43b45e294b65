"""Two processes with a GPU each; something else computes on the second's. Prints who is slow.

Its last line is a JSON: `said`, what a run would log; `own`, the probe's seconds on each GPU;
`scored`, whether nvidia-resiliency-ext timed the kernels as well.
"""

from __future__ import annotations

import contextlib
import json

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_kanana.config.watchdog_settings import WatchdogSettings
from megatron_kanana.training.stragglers import OwnTime, Stragglers
from tests.faults.busy_gpu import busy_gpu
from tests.faults.slow_rank import Told

STEPS = 4
SLOW = 1
"""Rank whose GPU is busy."""


def main() -> None:
    """Compute and meet, step by step."""
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    told = Told()
    stragglers = Stragglers(WatchdogSettings(straggler_interval=STEPS), OwnTime(), device)
    matrix = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)

    def step() -> None:
        for _ in range(20):
            matrix @ matrix
        dist.all_reduce(matrix[:8].clone())

    with busy_gpu(SLOW) if rank == SLOW else contextlib.nullcontext():
        dist.barrier()
        for number in range(1, STEPS + 1):
            stragglers.timed(step)
            stragglers.step_done(number, told if rank == 0 else None)  # type: ignore[arg-type]
        dist.barrier()
    if rank == 0:
        scored = stragglers._scores is not None
        print(json.dumps({"said": told.said, "own": told.own[1:], "scored": scored}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
