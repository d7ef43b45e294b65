"""Settings of where a run is started: this machine, or nodes of a SLURM cluster.

`tools/submit.py` reads them; the processes of the run do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting


@dataclass(kw_only=True)
class PreflightSettings:
    """What each node must pass before a run starts on it."""

    enabled: bool = setting(
        True, help="look at every node before the run starts, and leave bad out"
    )
    timeout: float = setting(
        300.0, help="seconds in which a node must have answered and been measured", above=0.0
    )
    minimum_free_disk: float = setting(
        0.0, help="GiB that must be free where the run and its checkpoints are written", minimum=0.0
    )
    maximum_clock_difference: float = setting(
        1.0, help="seconds between a node's clock and the middle of all", above=0.0
    )
    minimum_bandwidth: float = setting(
        0.0,
        help="GB/s of an all-reduce (bus bandwidth) inside a node and with its neighbour; a node"
        " below it in both directions is bad. 0 only measures",
        minimum=0.0,
    )
    bandwidth_size: float = setting(
        256.0, help="MiB that each process reduces to measure it", above=0.0
    )


@dataclass(kw_only=True)
class ClusterSettings:
    """Nodes, limits and launch of a run."""

    kind: str = setting(
        "local",
        help="local starts the run on this machine, slurm submits it",
        choices=("local", "slurm"),
    )
    nodes: int = setting(1, help="nodes the run is spread over", minimum=1)
    spare_nodes: int = setting(
        0, help="nodes asked for beyond, which take the place of bad ones", minimum=0
    )
    gpus_per_node: int | None = setting(
        None, help="GPUs of a node; 0 for a CPU; null is what this machine has", minimum=0
    )
    processes_per_node: int | None = setting(
        None, help="processes of a node; null is one a GPU, or one on a CPU", minimum=1
    )
    launcher: str = setting(
        "torchrun",
        help="torchrun is one task a node, which starts its processes; srun is one task a process",
        choices=("torchrun", "srun"),
    )
    restarts: int = setting(
        3,
        help="times the processes start again inside a job after one of them died or the watchdog"
        " ended them; by torchrun, not by srun",
        minimum=0,
    )
    partition: str | None = setting(None, help="SLURM partition; null is the cluster's default")
    account: str | None = setting(None, help="SLURM account; null is the user's default")
    time_limit: str = setting(
        "1-00:00:00", help="longest time of one job: [days-]hours:minutes:seconds"
    )
    signal_seconds: int = setting(
        600,
        help="seconds before the time limit at which the run saves and leaves: a step and a"
        " checkpoint must fit in; SLURM is up to 60 s late",
        minimum=60,
        maximum=65535,
    )
    requeue: bool = setting(
        True, help="an interrupted job goes into the queue again and resumes; false ends it"
    )
    exclude: list[str] = setting([], help="nodes never to use")
    sbatch_options: list[str] = setting(
        [], help="further options of sbatch, such as ['--qos=high','--mem=0']"
    )
    container: str = setting(
        "none",
        help="what the processes run in; pyxis is NVIDIA's plugin of srun with enroot",
        choices=("none", "pyxis", "apptainer"),
    )
    container_image: str | None = setting(
        None, help="image: registry path or .sqsh file (pyxis), .sif file (apptainer)"
    )
    container_mounts: list[str] = setting(
        [], help="folders seen in the container beside the project and the run's: from[:to]"
    )
    python: str | None = setting(
        None, help="Python that runs the job; null is that of submit.py, in a container python3"
    )
    setup: list[str] = setting(
        [],
        help="shell commands before the run, such as ['module load cuda/13.0']",
        several_lines=True,
    )
    variables: dict[str, str] = setting(
        {}, help="environment variables of the run, {NCCL_SOCKET_IFNAME: eth0}"
    )
    preflight: PreflightSettings = setting(PreflightSettings, help="looking at the nodes before")

    @property
    def processes_of_a_node(self) -> int:
        """Processes of a node; a node's GPUs must be known by then."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.nodes * self.processes_of_a_node
