"""Which process holds the others up.

All processes take the same time for a step, as each waits for the slowest. So the time that counts
is a process's own, without its waiting in collective operations; the watchdog's thread looks ten
times a second at which of the two the main thread is. GPUs compute beside it, so there the time is
that of products of matrices (`probe`), measured beside the comparison, and of the kernels of the
step before it where nvidia-resiliency-ext can time them (`gpu_scores.py`).
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_kanana.config.watchdog_settings import WatchdogSettings

from .gpu_scores import GpuScores, gpu_scores
from .records import Recorder
from .standstill import is_waiting

Arguments = ParamSpec("Arguments")
T = TypeVar("T")

_FEWEST_PEERS = 3
_PROBE_SIZE, _PROBE_PRODUCTS, _PROBE_REPETITIONS = 4096, 8, 5
"""Each repetition takes 1 to 2 ms on a GPU of today: beside that, launching it is nothing."""


class OwnTime:
    """Time of the main thread in steps, without waiting; written by the watchdog's thread."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def sample(self, frame: FrameType, seconds: float) -> None:
        """The main thread is at `frame`, and has been for that many seconds."""
        if not is_waiting(frame):
            self._seconds += seconds

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True)
class Comparison:
    """Own times of all processes.

    Attributes:
        seconds: own time of each rank.
        times_median: each over the median of those with the same work.
        slow: ranks above the factor, slowest first.
        hosts: of the slow ranks.
    """

    seconds: tuple[float, ...]
    times_median: tuple[float, ...]
    slow: tuple[int, ...]
    hosts: dict[int, str]


class Stragglers:
    """Compares the processes every some steps; every process must make one.

    Args:
        settings: how often, and from when on a process is slow.
        own_time: of this process.
        device: where the times are gathered.
    """

    def __init__(self, settings: WatchdogSettings, own_time: OwnTime, device: torch.device) -> None:
        self._interval = settings.straggler_interval if settings.enabled else 0
        self._factor = settings.straggler_factor
        self._own_time, self._device = own_time, device
        self._scores = _scores_everywhere(device) if self._interval else None
        self._steps = 0

    def timed(self, step: Callable[Arguments, T], *a: Arguments.args, **k: Arguments.kwargs) -> T:
        """Call the function that does a step, with a look at its kernels if it is time to."""
        if self._scores is None or self._steps + 1 < self._interval:
            return step(*a, **k)
        with self._scores.timed():
            return step(*a, **k)

    def step_done(self, step: int, recorder: Recorder | None) -> None:
        """Note a step, and compare if it is time to; every process must call this."""
        self._steps += 1
        if not self._interval or self._steps < self._interval:
            return
        own = self._own_time.take() / self._steps
        if self._device.type == "cuda":
            own = probe(self._device)
        self._steps = 0
        comparison = self._compare(own)
        slow_gpus = {} if self._scores is None else self._scores.slow(self._factor)
        if recorder is not None:
            for rank in comparison.slow:
                recorder.say(f"step {step}: {describe(comparison, rank)}")
            for rank, host in slow_gpus.items():
                recorder.say(
                    f"step {step}: slow: the GPU of rank {rank} on {host} takes"
                    f" {self._factor:g} times as long as the fastest, or longer"
                )
            recorder.record_own_times(step, comparison.seconds, comparison.hosts | slow_gpus)

    def _compare(self, own: float) -> Comparison:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        mine = torch.tensor([own, stage], dtype=torch.float64, device=self._device)
        all_of_them = mine.new_empty(dist.get_world_size(), 2)
        dist.all_gather(list(all_of_them.unbind()), mine)
        seconds, stages = all_of_them.T.tolist()
        times = times_median(seconds, stages)
        slow = sorted(
            (r for r, t in enumerate(times) if t >= self._factor), key=lambda r: -times[r]
        )
        hosts: list[str] = [""] * len(seconds)
        if slow:  # the same everywhere
            dist.all_gather_object(hosts, socket.gethostname())
        return Comparison(
            tuple(seconds), tuple(times), tuple(slow), {rank: hosts[rank] for rank in slow}
        )


def times_median(seconds: Sequence[float], stages: Sequence[float]) -> list[float]:
    """Each process's time over the median of those with the same work.

    Those are the processes of its pipeline stage, or all where a stage has too few; of an even
    number the faster of the two in the middle is the median, so that of two one can be slow.
    """
    ratios = []
    for own, stage in zip(seconds, stages, strict=True):
        peers = [s for s, of in zip(seconds, stages, strict=True) if of == stage]
        if len(peers) < _FEWEST_PEERS:
            peers = list(seconds)
        median = statistics.median_low(peers)
        ratios.append(own / median if median > 0 else 1.0)
    return ratios


def describe(comparison: Comparison, rank: int) -> str:
    """Words for the log."""
    return (
        f"slow: rank {rank} on {comparison.hosts[rank]} takes"
        f" {comparison.times_median[rank]:.2f} times the median of its peers"
        f" ({comparison.seconds[rank]:.3f} s a step without waiting)"
    )


def _scores_everywhere(device: torch.device) -> GpuScores | None:
    """The detector, if every process has one: it compares all of them."""
    scores = gpu_scores(device)
    if device.type == "cuda":
        without = torch.tensor([int(scores is None)], device=device)
        dist.all_reduce(without)
        if without.item():
            return None
    return scores


def probe(device: torch.device) -> float:
    """Seconds that some products of matrices take on this GPU, by the median of repetitions."""
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(matrix)
    times = []
    for _ in range(_PROBE_REPETITIONS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_PROBE_PRODUCTS):
            torch.mm(matrix, matrix, out=product)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
