"""Starting a job's processes as torchrun does, each forked from a Python that has loaded torch."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

ROOT = Path(__file__).resolve().parent.parent
LOCALHOST = "127.0.0.1"
SECONDS_TO_END = 30.0
"""What torchrun leaves a process after SIGTERM."""


class Python:
    """A `tests/forked_python.py` that runs one program at a time.

    Attributes:
        number: of the process of its newest program.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_python"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.number = 0
        atexit.register(self.end)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        """Start a program; what it prints is appended to two files."""
        assert self._server.stdin is not None
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        self.number = self._answer()

    def wait(self) -> int:
        """Wait for the program's end; its exit status."""
        return self._answer()

    def end(self) -> None:
        """There are no more programs to run."""
        self._server.kill()
        self._server.wait()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the Python that programs are forked from has ended"
        return int(line)


@functools.cache
def _python(rank: int, environment: tuple[tuple[str, str], ...]) -> Python:
    """One for each rank, so that their hashes of text differ as under torchrun."""
    return Python(dict(environment))


def run_forked(
    arguments: Sequence[str], environment: Mapping[str, str], processes: int, timeout: float
) -> tuple[int, str, str]:
    """Run a program on one process, or on several as torchrun does.

    Args:
        arguments: of Python.
        environment: of the processes, to which the place of each is added.
        processes: number of processes.
        timeout: seconds, after which everything is killed.

    Returns:
        exit status, of several processes that of the first one that failed, or 0; stdout; stderr.

    Raises:
        AssertionError: it did not end in time.
    """
    lasting = {name: text for name, text in environment.items() if name != "PYTEST_CURRENT_TEST"}
    pythons = [_python(rank, tuple(sorted(lasting.items()))) for rank in range(processes)]
    store = (
        TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    )
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        for path in (stdout, stderr):
            path.touch()
        for rank, python in enumerate(pythons):
            place = _place(rank, processes, store.port) if store is not None else {}
            python.start(arguments, {**environment, **place}, stdout, stderr)
        status = _wait(pythons, timeout)
        printed = stdout.read_text(), stderr.read_text()
    if status is None:
        raise AssertionError(f"no end after {timeout} s:\n" + "\n".join(printed))
    return status, *printed


def _place(rank: int, processes: int, port: int) -> dict[str, str]:
    """Variables of torchrun."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
        **{"MASTER_ADDR": LOCALHOST, "MASTER_PORT": str(port)},
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _wait(pythons: Sequence[Python], timeout: float) -> int | None:
    """Exit status of the first program that failed, or 0; None if there was no end in time.

    After one that fails, the others get SIGTERM, and later SIGKILL.
    """
    end = time.monotonic() + timeout
    failure = 0
    with futures.ThreadPoolExecutor(len(pythons)) as pool:
        program = {pool.submit(python.wait): python for python in pythons}
        running = set(program)
        try:
            while running:
                left = end - time.monotonic()
                ended, running = futures.wait(running, left, futures.FIRST_COMPLETED)
                if not ended:
                    break
                if failure == 0 and (failed := [each.result() for each in ended if each.result()]):
                    failure = failed[0]
                    end = min(end, time.monotonic() + SECONDS_TO_END)
                    _send(signal.SIGTERM, os.kill, [program[each] for each in running])
        finally:
            _send(signal.SIGKILL, os.killpg, [program[each] for each in running])
    return None if running and failure == 0 else failure


def _send(
    number: signal.Signals, send: Callable[[int, int], None], pythons: Sequence[Python]
) -> None:
    for python in pythons:
        with contextlib.suppress(ProcessLookupError):
            send(python.number, number)
