"""A process that computes longer than the others is named, though all steps take as long."""

from __future__ import annotations

import socket

from tests.faults.slow_rank import SECONDS, STEPS
from tests.launch import run_python


def test_the_slow_rank_is_named_with_its_host_by_its_own_time() -> None:
    finished = run_python("-m", "tests.faults.slow_rank", processes=2)
    assert finished.returncode == 0, finished.stderr
    named, own = finished.stdout.splitlines()
    assert named.startswith(f"step {STEPS}: slow: rank 1 on {socket.gethostname()} takes ")
    times = [float(word) for word in own.split()[2:]]
    assert times[0] < 0.7 * times[1]
    assert times[1] > 0.5 * SECONDS[1]
