"""Starting processes with the project's launcher, each start on GPUs of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_going: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Place:
    """Where processes run.

    Attributes:
        on_cuda: on GPUs over NCCL, or on a CPU over gloo.
        gpus: numbers of the GPUs, one a process; without any, all that are visible.
    """

    on_cuda: bool
    gpus: tuple[int, ...] = ()

    def split(self, total: int, processes: int) -> list[Place]:
        """Places for starts of `processes` at the same time, out of `total` GPUs; a CPU is one."""
        if not self.on_cuda:
            return [self]
        return [
            Place(True, tuple(range(first, first + processes)))
            for first in range(0, total - processes + 1, processes)
        ]


def command(
    module: str, arguments: Sequence[str], processes: int, place: Place, restarts: int = 0
) -> list[str]:
    """The launcher's command line for a module of the project."""
    launcher = [sys.executable, "-m", "megatron_kanana.cluster.launch", "--standalone"]
    launcher += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    if place.on_cuda:
        return [*launcher, "-m", module, *arguments]
    path = ROOT / f"{module.replace('.', '/')}.py"
    # Forked processes have the libraries already; CUDA does not bear it.
    return [*launcher, "--start-method=fork", "--run-path", str(path), *arguments]


def environment(place: Place) -> dict[str, str]:
    """Variables of a start: this process's, and its GPUs."""
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    if place.gpus:
        # Those of the process itself may be some of the machine's already.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(len(place.gpus) + 64)]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in place.gpus)
    elif not place.on_cuda:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


@contextlib.contextmanager
def started(words: Sequence[str], place: Place, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A start in a session of its own, whose output goes to `log`; what is left of it is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(place),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    _going.add(process)
    try:
        yield process
    finally:
        end(process)
        _going.discard(process)


def end_all_with_me() -> None:
    """From now on SIGTERM ends all that was started too, which else stays on the GPUs."""

    def end_all(*_: object) -> None:
        for process in list(_going):
            process.terminate()
        os._exit(128 + signal.SIGTERM)  # whatever is being waited for

    signal.signal(signal.SIGTERM, end_all)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a start, and kill what is left of it."""
    if process.poll() is None:
        # torchrun hands SIGTERM on to its processes, which may have sessions of their own.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(words: Sequence[str], place: Place, log: Path, seconds: float) -> str:
    """Wait for a start; what went wrong, or an empty text."""
    with started(words, place, log) as process:
        return wait(process, log, seconds)


def wait(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    """Wait for what was started; what went wrong, or an empty text."""
    try:
        code = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    return "" if code == 0 else f"ended with {code}: {last_error(log)}"


def last_error(log: Path) -> str:
    """The last line of a log that tells of an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or lines or ["no output"])[-1][:300]
