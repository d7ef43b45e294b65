"""Cluster settings that contradict one another or that SLURM would refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .cluster_settings import ClusterSettings
from .environment import Environment
from .problems import Problem
from .schema import Settings

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")

_OPTIONS_OF_SETTINGS = {
    "--nodes": "cluster.nodes",
    "-N": "cluster.nodes",
    "--ntasks": "cluster.launcher",
    "-n": "cluster.launcher",
    "--ntasks-per-node": "cluster.launcher",
    "--gres": "cluster.gpus_per_node",
    "--gpus-per-node": "cluster.gpus_per_node",
    "--partition": "cluster.partition",
    "-p": "cluster.partition",
    "--account": "cluster.account",
    "-A": "cluster.account",
    "--time": "cluster.time_limit",
    "-t": "cluster.time_limit",
    "--signal": "cluster.signal_seconds",
    "--requeue": "cluster.requeue",
    "--no-requeue": "cluster.requeue",
    "--exclude": "cluster.exclude",
    "-x": "cluster.exclude",
    "--job-name": "run_name",
    "-J": "run_name",
    "--output": "output_dir",
    "-o": "output_dir",
}
"""Options of sbatch that a setting of ours writes."""


def time_limit_seconds(time_limit: str) -> int | None:
    """Seconds of [days-]hours:minutes:seconds; None for text that is no such time."""
    match = _TIME_LIMIT.fullmatch(time_limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check_cluster(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The cluster's settings fit one another, whatever machine this is."""
    cluster = settings.cluster
    yield from _check_nodes(cluster)
    yield from _check_time(cluster)
    yield from _check_container(cluster)
    for option in cluster.sbatch_options:
        name = option.split("=")[0].split()[0] if option.strip() else option
        if not re.fullmatch(r"-\w|--[a-z][\w-]*", name):
            yield Problem(
                "cluster.sbatch_options", option, "is no option", "write each as '--name=value'"
            )
        elif name in _OPTIONS_OF_SETTINGS:
            yield Problem(
                "cluster.sbatch_options",
                option,
                "is written by a setting of its own",
                f"set {_OPTIONS_OF_SETTINGS[name]}",
            )
    for name in cluster.variables:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield Problem(
                f"cluster.variables.{name}",
                cluster.variables[name],
                "is no name of an environment variable",
                "use letters, digits and _",
            )


def _check_nodes(cluster: ClusterSettings) -> Iterator[Problem]:
    if cluster.kind == "local":
        for name in ("nodes", "spare_nodes"):
            value = getattr(cluster, name)
            if value > (name == "nodes"):
                yield Problem(
                    f"cluster.{name}",
                    value,
                    "cluster.kind = local starts the run on this machine alone",
                    "choose cluster=slurm, or start torchrun on each node (docs/cluster.md)",
                )
    elif cluster.gpus_per_node is None:
        yield Problem(
            "cluster.gpus_per_node",
            "null",
            "SLURM must be asked for a number",
            "give the GPUs of a node, or 0 to train on CPUs",
        )
    processes, gpus = cluster.processes_per_node, cluster.gpus_per_node
    if processes is not None and gpus and processes > gpus:
        yield Problem(
            "cluster.processes_per_node",
            processes,
            f"is more than the node's cluster.gpus_per_node = {gpus}",
            "start one process a GPU",
        )


def _check_time(cluster: ClusterSettings) -> Iterator[Problem]:
    seconds = time_limit_seconds(cluster.time_limit)
    if seconds is None:
        yield Problem(
            "cluster.time_limit",
            cluster.time_limit,
            "is no time",
            "write [days-]hours:minutes:seconds, such as 1-12:00:00",
        )
    elif cluster.signal_seconds >= seconds:
        yield Problem(
            "cluster.signal_seconds",
            cluster.signal_seconds,
            f"leaves nothing of cluster.time_limit = {cluster.time_limit} ({seconds} s)",
            "choose a shorter one, or a longer time limit",
        )


def _check_container(cluster: ClusterSettings) -> Iterator[Problem]:
    if cluster.container == "none":
        if cluster.container_image is not None:
            yield Problem(
                "cluster.container_image",
                cluster.container_image,
                "cluster.container = none runs it in no container",
                "set cluster.container=pyxis or apptainer",
            )
    elif cluster.kind == "local":
        yield Problem(
            "cluster.container",
            cluster.container,
            "cluster.kind = local starts the run as it is",
            "start submit.py in the container, or choose cluster=slurm",
        )
    elif cluster.container_image is None:
        yield Problem(
            "cluster.container_image",
            "null",
            f"cluster.container = {cluster.container} needs an image",
            "name it",
        )
