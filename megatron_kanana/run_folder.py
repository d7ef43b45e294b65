"""A run's folder has one job at a time: two would remove and overwrite each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_kanana.config import ConfigurationError
from megatron_kanana.config.problems import Problem
from megatron_kanana.config.schema import Settings

logger = logging.getLogger(__name__)

LOCK_FILE = "job.lock"
"""In the run's folder: locked by its job's first process, whose machine and number it tells."""

POLL_SECONDS = 0.5


@contextlib.contextmanager
def held_run_folder(settings: Settings) -> Iterator[None]:
    """Keep other jobs out of the run's folder; for the first process alone.

    The lock is POSIX's: it ends with the process, however that ends, is not inherited by those
    forked from it, and holds over the nodes of a file system that is shared. Where files cannot be
    locked a run goes on without.

    Raises:
        ConfigurationError: another job has the folder, for longer than
            `watchdog.other_job_timeout`.
    """
    path = Path(settings.run_dir) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:  # what follows will tell, if it needs the folder
        logger.warning("the run's folder is not kept from other jobs: %s", error)
        yield
        return
    with file:
        _lock(file, settings)
        yield


def _lock(file: BinaryIO, settings: Settings) -> None:
    seconds = settings.watchdog.other_job_timeout
    began = time.monotonic()
    told = False
    while not _is_locked(file):
        file.seek(0)
        holder = file.read().decode().strip() or "that has not told its machine"
        if time.monotonic() - began >= seconds:
            raise ConfigurationError([_taken(settings, holder)])
        if not told:
            logger.info("%s belongs to a job %s; waiting for its end", settings.run_dir, holder)
            told = True
        time.sleep(POLL_SECONDS)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    holder = f"on {socket.gethostname()}, process {os.getpid()}, since {since}\n"
    with contextlib.suppress(OSError):  # of a full disk, which is no reason not to train
        file.truncate(0)
        file.write(holder.encode())


def _is_locked(file: BinaryIO) -> bool:
    """Whether no other job has the lock; True as well where there are none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("the run's folder is not kept from other jobs: %s", error)
    return True


def _taken(settings: Settings, holder: str) -> Problem:
    return Problem(
        "run_name",
        settings.run_name,
        f"its folder {settings.run_dir} belongs to a job {holder}, which still runs",
        "wait for that job's end, end it, or choose another run_name",
    )
