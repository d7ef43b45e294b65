"""Who listens during a run: the launcher, where processes meet, and nobody else beyond loopback."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import pytest

from tests.launch import CONFIG_DIR, start_python

LISTENS = "0A"
SECONDS = 120


class Listening(NamedTuple):
    """A socket that takes connections."""

    address: str
    port: int


def listening() -> dict[str, Listening]:
    """All of this machine by inode, as the kernel's tables have them."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENS:
                address, port = local.split(":")
                words = [bytes.fromhex(word)[::-1] for word in re.findall(".{8}", address)]
                family = socket.AF_INET6 if len(words) > 1 else socket.AF_INET
                text = socket.inet_ntop(family, b"".join(words))
                found[rest[5]] = Listening(text, int(port, 16))
    return found


def sockets(process: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    found = set()
    with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                match = re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink()))
                found |= {match.group(1)} if match else set()
    return found


def processes(launcher: int) -> list[int]:
    """A process with all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(launcher).children(recursive=True)
        return [launcher, *(child.pid for child in children)]
    return []


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="needs Linux's /proc/net/tcp")
def test_only_the_launcher_listens_beyond_this_machine(tmp_path: Path, cache_dir: Path) -> None:
    launcher = start_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "megatron_kanana.train", "--config-dir", str(CONFIG_DIR), "experiment=small"),
        *(f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "device=cpu"),
        *("run_name=listening", "stop_after_step=4", "logging.tensorboard=true"),
    )
    seen: dict[int, set[Listening]] = {}
    deadline = time.monotonic() + SECONDS
    try:
        while launcher.poll() is None and time.monotonic() < deadline:
            for process in processes(launcher.pid):
                table = listening()
                mine = {table[inode] for inode in sockets(process) if inode in table}
                seen[process] = seen.get(process, set()) | mine
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, launcher.communicate()
    # The rendezvous, and the store through which the processes find one another.
    launchers = seen.pop(launcher.pid)
    assert len({each.port for each in launchers}) in (1, 2)
    # Between its fork and its start a process still holds the launcher's.
    workers = [own for addresses in seen.values() if (own := addresses - launchers)]
    assert len(workers) >= 2, seen
    for each in set().union(*workers):
        assert ipaddress.ip_address(each.address).is_loopback, each
