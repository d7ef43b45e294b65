"""Something else that computes on a GPU all the time. Argument: number of the GPU."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import torch

from tests.launch import ROOT

BUSY = "busy"
PROCESSES = 3
"""They take turns on the GPU, as does whoever else uses it."""


@contextlib.contextmanager
def busy_gpu(number: int) -> Iterator[None]:
    """Inside, processes of their own multiply matrices on that GPU."""
    command = [sys.executable, "-m", "tests.faults.busy_gpu", str(number)]
    with contextlib.ExitStack() as leaving:
        started = []
        for _ in range(PROCESSES):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            started.append(leaving.enter_context(process))
            leaving.callback(process.kill)
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == BUSY
        yield


def main(number: int) -> None:
    """Multiply until killed."""
    device = torch.device("cuda", number)
    matrix = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=product)
    torch.cuda.synchronize(device)
    print(BUSY, flush=True)
    while True:
        for _ in range(20):
            torch.mm(matrix, matrix, out=product)
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(int(sys.argv[1]))
