"""The watchdog on GPUs: NCCL's operations, slow GPUs, and a frozen process.

python -m pytest -m gpu tests/faults/test_watchdog_gpu.py     # half a minute on one GPU, two on two
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks.multi_gpu import starts
from megatron_kanana.config.saved import whole_path
from megatron_kanana.training import flight_recorder
from megatron_kanana.training.flight_recorder import flight_record, recorded
from megatron_kanana.training.gpu_scores import gpu_scores
from megatron_kanana.training.operation import Operation
from megatron_kanana.training.records import read_records
from megatron_kanana.training.stragglers import probe
from tests.checkpoints import saved_tensors
from tests.faults.busy_gpu import busy_gpu
from tests.faults.slow_gpu import SLOW, STEPS
from tests.faults.test_determinism_gpu import KERNELS, MODEL, MUON_CLIP
from tests.faults.undisturbed import different_records, different_tensors
from tests.launch import CONFIG_DIR, run_python

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs, over which NCCL communicates"
)

GPU = torch.device("cuda", 0)
CYCLES = 3_000_000_000  # of the GPU: a second and a half
PROBES = 7


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a job of its own over NCCL."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000")
    torch.cuda.set_device(GPU)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_an_operation_of_nccl_that_has_not_ended_is_named_with_its_processes() -> None:
    tensor = torch.ones(16, 64, device=GPU)
    dist.all_reduce(tensor)
    torch.cuda.synchronize(GPU)
    assert recorded("nccl").pending is None
    torch.cuda._sleep(CYCLES)
    dist.all_reduce(tensor)
    pending = recorded("nccl").pending
    assert pending is not None
    assert (pending.name, pending.ranks, pending.tensor) == ("nccl:all_reduce", (0,), "[16, 64]")
    torch.cuda.synchronize(GPU)
    assert recorded("nccl").pending is None
    assert recorded("nccl").last == Operation("nccl:all_reduce", (0,), "[16, 64]")
    entries = json.loads(flight_record("nccl") or "{}")["entries"]
    assert [entry["state"] for entry in entries[-2:]] == ["completed", "completed"]


@pytest.mark.usefixtures("alone")
def test_the_line_that_called_an_operation_of_nccl_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flight_recorder, "_CALL_SITE_SECONDS", 30.0)
    tensor = torch.ones(16, 64, device=GPU)
    dist.all_reduce(tensor)
    flight_recorder._call_site("nccl", 0)  # the first one imports modules
    torch.cuda._sleep(CYCLES)
    dist.all_reduce(tensor)
    pending = recorded("nccl").pending
    torch.cuda.synchronize(GPU)
    assert pending is not None
    assert re.search(r"\S+:\d+ \(test_the_line_that_called", pending.caller)


def test_products_of_matrices_take_longer_on_a_gpu_that_computes_something_else() -> None:
    """Whatever else uses the GPU only adds to a time, so the quickest of some is this one's own."""
    probe(GPU)  # the first one loads the library
    alone = min(probe(GPU) for _ in range(PROBES))
    with busy_gpu(GPU.index):
        beside = [probe(GPU) for _ in range(PROBES)]
    assert statistics.median(beside) > 1.5 * alone
    end = time.monotonic() + 20.0
    while probe(GPU) >= 1.5 * alone:
        assert time.monotonic() < end, "it takes as long after the others have ended"
        time.sleep(0.1)
    operations = 8 * 2 * 4096**3
    assert operations / alone > 2e14  # the product is timed, not its launch


@pytest.mark.usefixtures("alone")
def test_kernels_are_timed_by_nvidia_resiliency_ext(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nvidia_resiliency_ext.straggler", reason="it is not installed")
    caplog.set_level("INFO")
    scores = gpu_scores(GPU)
    if scores is None:
        pytest.skip(caplog.text)  # the version of CUPTI that it wants is not there
    matrix = torch.ones(2048, 2048, dtype=torch.bfloat16, device=GPU)

    def slow(factor: float) -> dict[int, str]:
        with scores.timed():
            matrix @ matrix
        return scores.slow(factor)

    assert slow(1.5) == {}
    assert slow(0.5) == {0: socket.gethostname()}  # as fast as the fastest: it has a score


@two_gpus
def test_a_slow_gpu_is_named_with_its_host() -> None:
    finished = run_python("-m", "tests.faults.slow_gpu", processes=2)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    host = socket.gethostname()
    assert told["own"][SLOW] > 1.5 * told["own"][1 - SLOW]
    assert told["said"][0].startswith(f"step {STEPS}: slow: rank {SLOW} on {host} takes ")
    others = told["said"][
        1:
    ]  # of nvidia-resiliency-ext, to which waiting for a turn is no slowness
    assert all(f"the GPU of rank {SLOW} on {host}" in line for line in others)
    assert len(others) <= told["scored"]
    print(told)


LENGTH, FREEZE_STEP, FROZEN = 14, 7, 1
"""Steps of a run, after which one rank is frozen; and the rank."""
LIMIT_SECONDS = 300.0
LAYOUT = (
    *("device=cuda", "parallel.expert_parallel_size=2", *MUON_CLIP, "kernels.deterministic=true"),
    *(f"schedule.steps={LENGTH}", "checkpoint.save_interval=5", "checkpoint.asynchronous=true"),
    *("watchdog.timeout=15", "watchdog.long_timeout=150", "schedule.global_batch_size=4"),
)
WORDS = {"bf16": (*MODEL, *KERNELS, "precision=bf16"), "fp32": ("precision=fp32",)}
UNDISTURBED = "undisturbed"


@dataclass(frozen=True)
class Frozen:
    """A run on two GPUs, one of whose ranks was frozen, or none.

    Attributes:
        run_dir: folder of the run.
        status: of the launcher.
        seconds: from the freeze to the watchdog's report.
        log: what the launcher and all processes said.
    """

    run_dir: Path
    status: int
    seconds: float
    log: str


def train(folder: Path, cache_dir: Path, name: str, *, freeze: bool) -> Frozen:
    """A run under the project's launcher; SIGSTOP hits a rank of its first start."""
    words = [
        *("--config-dir", str(CONFIG_DIR), "experiment=small", f"run_name={name}"),
        *(f"output_dir={folder}", f"data.cache_dir={cache_dir}", *LAYOUT),
        *WORDS.get(name, WORDS["bf16"]),
    ]
    place = starts.Place(on_cuda=True, gpus=(0, 1))
    run_dir, log = folder / name, folder / f"{name}.log"
    command = starts.command("megatron_kanana.train", words, 2, place, restarts=1)
    end = time.monotonic() + LIMIT_SECONDS

    def until(seen: Callable[[], bool]) -> None:
        while not seen():
            text = log.read_text(errors="replace")[-5000:]
            assert process.poll() is None, f"it ended with {process.returncode}:\n{text}"
            assert time.monotonic() < end, f"no end of it:\n{text}"
            time.sleep(0.01)

    seconds = 0.0
    with starts.started(command, place, log) as process:
        if freeze:
            until(lambda: last_step(run_dir) >= FREEZE_STEP)
            os.kill(process_of_rank(process.pid, FROZEN), signal.SIGSTOP)
            frozen_at = time.monotonic()
            until(lambda: any(run_dir.glob("hangs/*/report.txt")))
            seconds = time.monotonic() - frozen_at
        status = process.wait(max(1.0, end - time.monotonic()))
    return Frozen(run_dir, status, seconds, log.read_text(errors="replace"))


def last_step(run_dir: Path) -> int:
    """The last that the run has recorded."""
    records = list(read_records(run_dir / "metrics.jsonl"))
    return int(records[-1]["step"]) if records else 0


def process_of_rank(launcher: int, rank: int) -> int:
    """Number of the process that the launcher started for a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
            if parent == launcher and f"RANK={rank}".encode() in variables:
                return int(path.name)
    raise AssertionError(f"rank {rank} of launcher {launcher} is not there")


@pytest.fixture(scope="module")
def frozen(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
) -> Iterator[dict[str, Future[Frozen]]]:
    """The runs, at the same time, each with a copy of the data."""
    folder = tmp_path_factory.mktemp("frozen")

    def start(name: str) -> Frozen:
        data = folder / f"data_of_{name}"
        shutil.copytree(cache_dir, data)
        return train(folder, data, name, freeze=name != UNDISTURBED)

    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(start, name) for name in (*WORDS, UNDISTURBED)}


@two_gpus
@pytest.mark.parametrize("precision", WORDS)
def test_a_frozen_rank_is_named_with_the_operation_of_nccl_and_the_run_goes_on(
    precision: str, frozen: dict[str, Future[Frozen]]
) -> None:
    run = frozen[precision].result()
    assert run.status == 0, run.log[-5000:]
    (report,) = run.run_dir.glob("hangs/*/report.txt")
    told = report.read_text()
    print(f"{run.seconds:.1f} s after the freeze:\n{told}")
    silent = [line for line in told.splitlines() if "does not answer" in line]
    assert len(silent) == 1
    assert re.match(rf"rank {FROZEN} \(.*\) does not answer: it is stopped \(SIGSTOP", silent[0])
    waiting = rf"^rank {1 - FROZEN} waits in step \d+: nccl:.* over ranks 0, 1, called at \S+:\d+"
    assert re.search(waiting, told, re.MULTILINE)
    trace = json.loads((report.parent / f"nccl_of_rank_{1 - FROZEN}.json").read_text())
    assert any(entry["state"] != "completed" for entry in trace["entries"])
    assert (report.parent / f"stacks_of_rank_{1 - FROZEN}.txt").stat().st_size
    assert not list(report.parent.glob(f"*_of_rank_{FROZEN}.*"))
    assert last_step(run.run_dir) == LENGTH


@two_gpus
def test_the_run_ends_with_the_bits_of_one_that_nobody_disturbed(
    frozen: dict[str, Future[Frozen]],
) -> None:
    """csrc's kernels in bf16; NCCL sums two processes in one order."""
    ours, undisturbed = (frozen[name].result().run_dir for name in ("bf16", UNDISTURBED))
    records = [list(read_records(folder / "metrics.jsonl")) for folder in (ours, undisturbed)]
    assert list(different_records(*records)) == []
    tensors = [saved_tensors(whole_path(f / "checkpoints", LENGTH)) for f in (ours, undisturbed)]
    assert list(different_tensors(*tensors)) == []
