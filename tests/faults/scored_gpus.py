"""Two processes whose GPUs nvidia-resiliency-ext compares; what CUPTI would measure is made up.

Prints a JSON of who is slow. The package's own code gathers and judges the times over gloo, so it
must be installed; a GPU is not needed.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist

from megatron_kanana.training.gpu_scores import gpu_scores

SLOW, TIMES_SLOWER = 1, 2.0
KERNELS = {"product_1_128": 300.0, "norm_1_32": 10.0}
"""Microseconds of kernels by name."""
COMMUNICATION = {"ncclDevKernel_AllReduce_0_0": 900.0}
"""It takes longer where nobody is late: that must not count."""


class MadeUpProfiler:
    """In place of the package's compiled part, which reads CUPTI."""

    def __init__(self, **_: object) -> None:
        self.running = self.was_started = False

    def initialize(self) -> None:
        """Nothing to do."""

    def start(self) -> None:
        """A section begins."""
        self.running = self.was_started = True

    def stop(self) -> None:
        """It ends."""
        self.running = False

    def get_stats(self) -> dict[str, SimpleNamespace]:
        """Times of kernels since `start`, in the form of the compiled part."""
        assert self.was_started
        assert not self.running
        slow = dist.get_rank() == SLOW
        times = {name: us * (TIMES_SLOWER if slow else 1.0) for name, us in KERNELS.items()}
        times |= {name: us * (0.1 if slow else 1.0) for name, us in COMMUNICATION.items()}
        return {
            name: SimpleNamespace(min=us, max=us, median=us, avg=us, stddev=0.0, num_calls=4)
            for name, us in times.items()
        }

    def reset(self) -> None:
        """Forget the times."""
        self.was_started = False


def main() -> None:
    """Time two steps and compare after each."""
    compiled = ModuleType("nvrx_cupti_module")
    vars(compiled)["CuptiProfiler"] = MadeUpProfiler
    sys.modules["nvrx_cupti_module"] = compiled
    torch.cuda.synchronize = lambda device=None: None
    dist.init_process_group("gloo")
    scores = gpu_scores(torch.device("cuda"))
    assert scores is not None
    found = []
    for factor in (1.5, 3.0):
        with scores.timed():
            pass
        found.append(scores.slow(factor))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
