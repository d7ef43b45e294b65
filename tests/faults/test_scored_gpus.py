"""A slow GPU is named by nvidia-resiliency-ext itself, of which only CUPTI's part needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import socket

import pytest

from tests.faults.scored_gpus import SLOW
from tests.launch import run_python


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None,
    reason="nvidia-resiliency-ext is not installed",
)
def test_the_slow_gpu_is_named_by_the_times_of_kernels_without_those_of_communication() -> None:
    finished = run_python("-m", "tests.faults.scored_gpus", processes=2)
    assert finished.returncode == 0, finished.stderr
    twice, three_times = json.loads(finished.stdout.splitlines()[-1])
    assert twice == {str(SLOW): socket.gethostname()}
    assert three_times == {}
