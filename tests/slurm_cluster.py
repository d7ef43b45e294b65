"""A SLURM cluster of several nodes on this machine, for as long as a test needs it.

slurmctld, munged and a slurmd for each node, with everything they write in one folder. The nodes
share this machine's processors; each has a host name, an address and mounts of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.launch import free_ports

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks it whether to start the services of a package that it installs."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=8 RealMemory=8000
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
"""


def why_not() -> str | None:
    """Installs SLURM where it can; the reason where there is none afterwards."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        _install()
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no SLURM here, and none could be installed: {', '.join(missing)} missing"
    if os.geteuid() != 0:
        return "nodes with names of their own on one machine need root"
    namespaces = subprocess.run(["unshare", "--mount", "--uts", "true"], check=False)
    return None if namespaces.returncode == 0 else "no namespaces for the nodes' names here"


def _install() -> None:
    """Install Debian's packages without starting their services."""
    created = not POLICY.exists()
    if created:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
        for command in (["apt-get", "update"], install):
            subprocess.run(command, env=environment, check=False, capture_output=True, timeout=240)
    finally:
        if created:
            POLICY.unlink()


@dataclass
class Cluster:
    """A cluster that runs.

    Attributes:
        environment: variables by which SLURM's commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def run_on(self, node: str, *command: str) -> None:
        """Run a command with a node's mounts, which it may change for that node alone."""
        daemon = (self.folder / f"{node}.pid").read_text().strip()
        self.run("nsenter", f"--target={daemon}", "--mount", *command)

    def run(self, *command: str, timeout: float = 30.0) -> str:
        """What a command prints; it must succeed."""
        finished = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert finished.returncode == 0, (command, finished.stdout, finished.stderr)
        return finished.stdout

    def job(self, number: int) -> dict[str, str]:
        """SLURM's record of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number: int, *states: str, timeout: float = 120.0) -> dict[str, str]:
        """Wait until a job is in one of some states; its record."""

        def reached() -> bool:
            return self.job(number)["JobState"] in states

        wait_until(reached, timeout, lambda: f"{states}: {self.job(number)}")
        return self.job(number)


def wait_until(
    condition: Callable[[], bool], timeout: float, said: Callable[[], str] = str
) -> None:
    """Wait for a condition, or fail with what `said` says."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {said()}"
        time.sleep(0.2)


@contextlib.contextmanager
def cluster(folder: Path, nodes: int, variables: Mapping[str, str]) -> Iterator[Cluster]:
    """Start a cluster with nodes n1, n2, …, and stop it with every process of its jobs.

    Args:
        folder: new folder for everything it writes.
        nodes: number of nodes.
        variables: environment of SLURM's commands, and so of its jobs.
    """
    names = [f"n{index + 1}" for index in range(nodes)]
    for each in ("munge", "state", *names):
        (folder / each).mkdir(parents=True, mode=0o755)
    addresses = {name: f"127.0.0.{11 + index}" for index, name in enumerate(names)}
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(lines))
    ports = free_ports(nodes + 1)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            controller_port=ports[-1],
            nodes="\n".join(
                f"NodeName={name} NodeHostname={name} NodeAddr={addresses[name]} Port={port}"
                for name, port in zip(names, ports[:-1], strict=True)
            ),
        )
    )
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge" / "key").chmod(0o600)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
        **variables,
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    of_munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    munge = [f"--{key}={folder}/munge/{name}" for key, name in of_munge.items()]
    daemons = [
        ["munged", "--foreground", "--force", *munge, f"--seed-file={folder}/munge/seed"],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        *(
            [
                *("unshare", "--mount", "--uts", "bash", "-c"),
                f"mount --bind {folder}/hosts /etc/hosts && hostname {name}"
                f" && exec slurmd -D -f {folder}/slurm.conf -N {name}",
            ]
            for name in names
        ),
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            running.append(
                subprocess.Popen(
                    daemon,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            if daemon[0] == "munged":
                wait_until((folder / "munge" / "socket").exists, 10)
        started = Cluster(folder, environment)

        def all_idle() -> bool:
            command = ["sinfo", "--noheader", "--Node", "--format=%t"]
            found = subprocess.run(command, env=environment, capture_output=True, check=False)
            return found.stdout.split() == [b"idle"] * nodes

        wait_until(all_idle, 30, lambda: (folder / "slurmctld.log").read_text()[-2000:])
        yield started
    finally:
        _stop(running, folder, environment)


def _stop(
    running: list[subprocess.Popen[bytes]], folder: Path, environment: Mapping[str, str]
) -> None:
    """End jobs and daemons, and whatever is left of them."""
    with contextlib.suppress(subprocess.SubprocessError):
        for options in ([], ["--signal=KILL", "--full"]):
            command = ["scancel", *options, "--user=root"]
            subprocess.run(command, env=environment, check=False, timeout=10, capture_output=True)
    for daemon in reversed(running):
        daemon.terminate()
    for daemon in running:
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
    # Their environment tells processes of this cluster from all others.
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
