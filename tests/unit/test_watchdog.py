"""Whom a run that stands still waits for, who is slow, and when time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from megatron_kanana.config.exit_status import END_TIME, LAUNCH_TIME
from megatron_kanana.training import gpu_scores, processes
from megatron_kanana.training.deadline import Deadline
from megatron_kanana.training.interruption import Interruption
from megatron_kanana.training.operation import Operation
from megatron_kanana.training.processes import Place, this_place
from megatron_kanana.training.standstill import Report, culprits, describe
from megatron_kanana.training.stragglers import times_median

PLACES = {rank: f"n{rank}, process {100 + rank}" for rank in range(4)}


def waits(*ranks: int, name: str = "all_reduce") -> Report:
    """A process in a collective over some ranks."""
    return Report("step 7", 60.0, Operation(name, ranks, "[16] float32", "here.py:1"), "here.py:1")


BUSY = Report("step 7", 60.0, None, "data/loader.py:5 (next)")


def test_a_silent_rank_is_named_whoever_waits_for_whom() -> None:
    """Ranks 0 and 1 wait for 2, which waits for 3."""
    reports = {0: waits(0, 2), 1: waits(0, 1, 2, 3), 2: waits(2, 3), 3: None}
    assert culprits(reports) == [3]
    told = describe(reports, PLACES, {3: "it is stopped (SIGSTOP, or a debugger)"})
    assert "rank 3 (n3, process 103) does not answer: it is stopped" in told
    assert "rank 2 waits in step 7: all_reduce of [16] float32 over ranks 2, 3" in told


def test_a_rank_that_is_busy_elsewhere_is_named_with_its_place() -> None:
    reports = {0: waits(0, 1), 1: BUSY, 2: waits(0, 1, 2, 3), 3: waits(0, 1, 2, 3)}
    assert culprits(reports) == [1]
    told = describe(reports, PLACES, {})
    assert "rank 1 (n1, process 101) is waited for: step 7 for 60 s, at data/loader.py:5" in told
    assert "ranks 2, 3 wait in step 7: all_reduce" in told


def test_operations_that_do_not_fit_together_are_all_told() -> None:
    reports = {0: waits(0, 1), 1: waits(0, 1, name="barrier")}
    assert culprits(reports) == []
    told = describe(reports, PLACES, {})
    assert "do not fit together" in told
    assert "rank 0 waits in step 7: all_reduce" in told
    assert "rank 1 waits in step 7: barrier" in told


def test_a_gpu_or_network_that_stands_still_is_told_from_operations_that_do_not_fit() -> None:
    """Each of two pairs waits in an operation in which both of its processes are."""
    reports = {0: waits(0, 1), 1: waits(0, 1), 2: waits(2, 3), 3: waits(2, 3)}
    told = describe(reports, PLACES, {})
    assert "no rank is missing: all wait in the same operations: a GPU, or what is between" in told
    assert "ranks 0, 1 wait in step 7: all_reduce" in told
    assert "do not fit" in describe({**reports, 3: waits(1, 3)}, PLACES, {})


def test_the_last_operation_that_has_ended_is_told_of_a_rank_that_is_busy() -> None:
    last = "nccl:all_reduce of [4] over ranks 0, 1"
    busy = Report("step 7", 60.0, None, "data/loader.py:5 (next)", last)
    told = describe({0: waits(0, 1), 1: busy}, PLACES, {})
    assert f"at data/loader.py:5 (next); the last operation recorded, {last}, has ended" in told


def test_a_frozen_process_is_told_from_one_that_runs_and_only_itself_is_killed() -> None:
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(1.0)
    status = processes._status(child)
    place = Place(this_place().host, child, int(status[19]))
    try:
        assert "runs" in processes.state_of(place)
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        assert "stopped (SIGSTOP" in processes.state_of(place)
        processes.kill(Place(place.host, child, place.started + 1))  # another one of that number
        processes.kill(Place("elsewhere", child, place.started))
        assert "stopped" in processes.state_of(place)
        processes.kill(place)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert processes.state_of(place) == "its process is gone"


@pytest.mark.parametrize(
    ("seconds", "stages", "expected"),
    [
        ([1.0, 1.0, 3.0, 1.0], [0, 0, 0, 0], [1.0, 1.0, 3.0, 1.0]),
        ([1.0, 2.0], [0, 0], [1.0, 2.0]),  # of two, one can be slow
        ([1.0, 1.0, 2.0, 4.0, 4.0, 4.0], [0, 0, 0, 1, 1, 1], [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]),
        ([1.0, 1.5], [0, 1], [1.0, 1.5]),  # a stage of one has no peers of its own
    ],
)
def test_times_are_compared_with_processes_of_the_same_work(
    seconds: list[float], stages: list[float], expected: list[float]
) -> None:
    assert times_median(seconds, stages) == pytest.approx(expected)


def test_the_deadline_leaves_time_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.delenv(END_TIME, raising=False)
    monkeypatch.setenv(LAUNCH_TIME, "900")  # an earlier start of the same launch counts
    deadline = Deadline("0:10:00")  # until 1500
    clock[0] = 1020.0
    assert not deadline.has_come(100.0)
    clock[0] = 1300.0  # a step of 280 s: 1.5 * (280 + 100) + 10 do not fit any more
    assert deadline.has_come(100.0)

    monkeypatch.setenv(END_TIME, "1350")  # the job's own end comes before
    clock[0] = 1300.0
    deadline = Deadline("3600")
    clock[0] = 1301.0
    assert not deadline.has_come(10.0)
    assert deadline.has_come(None)  # an unknown save may take a minute
    monkeypatch.delenv(END_TIME)
    assert not Deadline(None).has_come(None)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143)])
def test_a_signal_during_start_up_ends_the_process_with_its_status(
    number: signal.Signals, status: int
) -> None:
    child = os.fork()
    if child == 0:
        with Interruption():
            os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


class FakeDetector:
    """Answers as nvidia-resiliency-ext 0.4.1 does, which tests/faults/scored_gpus.py runs."""

    initialized = False
    calls: ClassVar[list[str]] = []

    @classmethod
    def initialize(cls, *, scores_to_compute: list[str], gather_on_rank0: bool) -> None:
        """Note the call."""
        assert scores_to_compute == ["relative_perf_scores"]
        assert gather_on_rank0
        cls.initialized = True

    @classmethod
    @contextlib.contextmanager
    def detection_section(cls, name: str) -> Iterator[None]:
        """Note entry and exit."""
        cls.calls.append(name)
        yield
        cls.calls.append("end")

    @staticmethod
    def generate_report() -> SimpleNamespace:
        """Rank 2 is half as fast as the others."""
        scores = {0: 1.0, 1: 0.9, 2: 0.5}

        def identify(*, gpu_rel_threshold: float) -> dict[str, set[Any]]:
            slow = {(r, f"n{r}") for r, score in scores.items() if score < gpu_rel_threshold}
            ids = {StragglerId(rank, node) for rank, node in slow}
            return {"straggler_gpus_relative": ids}

        return SimpleNamespace(gpu_relative_perf_scores=scores, identify_stragglers=identify)


class StragglerId(NamedTuple):
    """A process and its host, as the package names them."""

    rank: int
    node: str


def test_gpus_are_scored_by_nvidia_resiliency_ext_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu_scores.gpu_scores(torch.device("cpu")) is None
    assert gpu_scores.gpu_scores(torch.device("cuda")) is None  # not here, or without CUPTI
    name = "nvidia_resiliency_ext.straggler"
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", ModuleType("nvidia_resiliency_ext"))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[name])["Detector"] = FakeDetector
    scores = gpu_scores.gpu_scores(torch.device("cuda"))
    assert scores is not None
    with scores.timed():
        assert FakeDetector.calls == ["step"]
    assert FakeDetector.calls == ["step", "end"]
    assert scores.slow(1.5) == {2: "n2"}
    assert scores.slow(3.0) == {}


def test_a_version_of_cupti_that_is_missing_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As nvidia-resiliency-ext 0.4.1 beside torch for CUDA 13."""

    class WithoutCupti(FakeDetector):
        initialized = False

        @classmethod
        def initialize(cls, **_: Any) -> None:
            raise ImportError("libcupti.so.12: cannot open shared object file")

    name = "nvidia_resiliency_ext.straggler"
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", ModuleType("nvidia_resiliency_ext"))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[name])["Detector"] = WithoutCupti
    caplog.set_level("INFO")
    assert gpu_scores.gpu_scores(torch.device("cuda")) is None
    assert "libcupti.so.12" in caplog.text
