"""Work in a process of its own: its result, its error, and every way it may end without a word."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_kanana.checkpoint.background import Outcome, Work
from megatron_kanana.checkpoint.free_space import describe, free_bytes, readable


def ended(work: Work, seconds: float = 20.0) -> Outcome:
    """What came of it, within a time limit."""
    until = time.monotonic() + seconds
    while (outcome := work.outcome()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return outcome


@pytest.mark.parametrize("background", [True, False])
def test_result_and_error_come_back(background: bool, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))

    large = os.urandom(1 << 20)  # more than a pipe holds
    assert ended(Work(lambda: large, background=background)) == Outcome(large)
    error = ended(Work(fail, background=background)).error
    assert error is not None
    assert error.startswith(f"{tmp_path}/file: No space left on device (")
    assert error.endswith(" free)")
    wrong = ended(Work(lambda: int("many"), background=background)).error
    assert wrong is not None
    assert wrong.startswith("ValueError: invalid literal")


ENDINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        "ended by SIGKILL, most often for lack of memory",
    ),
    "ended": (lambda: os.kill(os.getpid(), signal.SIGUSR2), "ended by SIGUSR2"),
    "left": (lambda: os._exit(3), "ended with status 3 and without a word"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_process_that_ends_without_a_word_is_noticed(name: str) -> None:
    function, words = ENDINGS[name]
    error = ended(Work(function, background=True)).error
    assert error is not None
    assert words in error


def test_work_beyond_its_time_is_ended(tmp_path: Path) -> None:
    def late() -> None:
        (tmp_path / "process").write_text(str(os.getpid()))
        time.sleep(60)

    started = time.monotonic()
    work = Work(late, background=True, time_limit=0.6)
    error = ended(work).error
    assert error is not None
    assert "not written within checkpoint.save_time_limit, 0.01 minutes" in error
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def test_signals_for_the_run_do_not_end_the_writer(tmp_path: Path) -> None:
    def write() -> str:
        (tmp_path / "process").write_text(str(os.getpid()))
        until = time.monotonic() + 10
        while not (tmp_path / "signalled").exists() and time.monotonic() < until:
            time.sleep(0.01)
        return "written"

    work = Work(write, background=True)
    while not (tmp_path / "process").exists() or not (tmp_path / "process").read_text():
        time.sleep(0.01)
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(int((tmp_path / "process").read_text()), each)
    (tmp_path / "signalled").touch()
    assert ended(work) == Outcome("written")


def test_error_of_a_disk_names_the_file_and_what_is_free(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there"
    free = free_bytes(path)
    assert free is not None
    assert abs(free - os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize) < free * 0.1
    error = OSError(errno.EROFS, "Read-only file system", str(path))
    assert describe(error).startswith(f"{path}: Read-only file system (")
    assert describe(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert [readable(size) for size in (999, 12_345, 9_400_000, 5 * 10**12)] == [
        "999 bytes",
        "12.3 kB",
        "9.4 MB",
        "5.0 TB",
    ]
