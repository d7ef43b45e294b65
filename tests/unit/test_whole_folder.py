"""Folders that runs share: whole or not there, whoever makes them, and however many at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kanana.data import whole_folder as module
from megatron_kanana.data.whole_folder import whole_folder

CONTEXT = multiprocessing.get_context("fork")
FILES = 50


def make(folder: Path, wait: Callable[[], object]) -> None:
    """Write numbered files, once all have begun."""
    with whole_folder(folder) as partial:
        wait()
        for number in range(FILES):
            (partial / str(number)).write_text(str(number))


def contents(folder: Path) -> dict[str, str]:
    """Texts of files by name."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_processes_that_make_it_at_once_all_end_well(tmp_path: Path) -> None:
    barrier = CONTEXT.Barrier(4)
    folder = tmp_path / "cache" / "data[1]"
    processes = [CONTEXT.Process(target=make, args=(folder, barrier.wait)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert contents(folder) == {str(number): str(number) for number in range(FILES)}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "data") as partial:
        (partial / "file").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_put_in_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError), whole_folder(tmp_path / "data"):
        (tmp_path / "data").write_text("no folder")
    assert (tmp_path / "data").read_text() == "no folder"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_others_write_is_kept_and_what_ended_ones_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    kept = {
        f"data.partial.{here}.{os.getppid()}",  # which runs
        "data.partial.another.machine.1",
        "data.partial.strange",
        f"other.partial.{here}.{ended.pid}",
    }
    left = {
        f"data.partial.{here}.{ended.pid}",
        f"data.partial.{here}.{os.getpid()}",
        "data.partial.another.machine.2",
    }
    for name in kept | left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    path = tmp_path / "data.partial.another.machine.2"
    then = path.stat().st_mtime - module.LEFT_BEHIND_SECONDS - 1
    os.utime(path, (then, then))
    make(tmp_path / "data", wait=lambda: None)
    assert {path.name for path in tmp_path.iterdir()} == kept | {"data"}
