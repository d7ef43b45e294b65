"""Two jobs of one name: the second waits, is refused, or goes on where the first was killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kanana.config import ConfigurationError, Environment, load_settings
from megatron_kanana.config.exit_status import WRONG_CONFIGURATION
from megatron_kanana.config.schema import Settings
from megatron_kanana.run_folder import held_run_folder
from tests.launch import CONFIG_DIR, ROOT, run_python

HOLD = f"""
import os, sys, time
from megatron_kanana.config import Environment, load_settings
from megatron_kanana.run_folder import held_run_folder
settings = load_settings(sys.argv[2:], Environment(), {str(CONFIG_DIR)!r})
with held_run_folder(settings):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("holds", flush=True)
    time.sleep(float(sys.argv[1]))
"""


def words(folder: Path, seconds: float) -> tuple[str, ...]:
    """Settings of a run of two steps, whose start waits so long for another job."""
    return (
        "experiment=small",
        "device=cpu",
        f"output_dir={folder}",
        "run_name=one",
        "stop_after_step=2",
        f"watchdog.other_job_timeout={seconds}",
    )


def settings_of(folder: Path, seconds: float) -> Settings:
    """The same, checked."""
    return load_settings(list(words(folder, seconds)), Environment(), str(CONFIG_DIR))


@contextlib.contextmanager
def another_job(folder: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run's folder for some seconds, and has forked one that lives on."""
    command = [sys.executable, "-c", HOLD, str(seconds), *words(folder, 0)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_job_is_refused_by_name_and_the_first_ones_files_stay(
    tmp_path: Path, cache_dir: Path
) -> None:
    half = tmp_path / "one" / "checkpoints" / "step_00000007.partial"
    half.mkdir(parents=True)
    (half / "file").write_text("half")
    (tmp_path / "one" / "metrics.jsonl").write_text("")
    job = ("-m", "megatron_kanana.train", "--config-dir", str(CONFIG_DIR), *words(tmp_path, 0.5))
    job = (*job, f"data.cache_dir={cache_dir}")
    with another_job(tmp_path, 60) as first:
        second = run_python(*job, processes=2)
        assert second.returncode == WRONG_CONFIGURATION
        assert "run_name = one" in second.stderr
        holder = f"a job on {socket.gethostname()}, process {first.pid}, since 2"
        assert holder in second.stderr and "choose another run_name" in second.stderr
    assert (half / "file").read_text() == "half"
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == ""
    third = run_python(*job, processes=2)
    assert third.returncode == 0, third.stderr
    assert not half.exists()


def test_a_start_waits_for_a_job_that_is_about_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = settings_of(tmp_path, 60)
    with another_job(tmp_path, 3) as first, held_run_folder(settings):
        assert f"process {first.pid}, since" in caplog.text
        assert f"process {os.getpid()}, since" in (tmp_path / "one/job.lock").read_text()
        assert first.wait(30) == 0


def test_a_killed_jobs_folder_is_free_though_a_process_that_it_forked_lives(tmp_path: Path) -> None:
    with another_job(tmp_path, 60) as first:
        with pytest.raises(ConfigurationError), held_run_folder(settings_of(tmp_path, 0)):
            pass
        first.kill()
        first.wait()
        with held_run_folder(settings_of(tmp_path, 0)):
            pass
        os.killpg(first.pid, 0)  # the forked one is there


def test_where_files_cannot_be_locked_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with held_run_folder(settings_of(tmp_path, 0)):
        assert "not kept from other jobs: [Errno 37] No locks available" in caplog.text


def test_where_the_folder_cannot_be_written_what_needs_it_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path, 0)
    (tmp_path / "one").touch()
    with held_run_folder(settings):
        assert "not kept from other jobs" in caplog.text
