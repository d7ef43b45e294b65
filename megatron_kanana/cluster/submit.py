"""From the words of a command line to a submitted, or started, run."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Problem,
    Settings,
    detect_environment,
    load_settings,
)
from megatron_kanana.config.cluster_settings import ClusterSettings
from megatron_kanana.config.compose import cluster_settings

from .script import excluded_nodes, records_folder, render

_SHORT = ("nodes", "spare_nodes", "partition", "account", "time_limit")
"""Settings of the cluster that need no `cluster.` before them here."""

_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Submission:
    """A run that is ready to start.

    Attributes:
        settings: the checked configuration.
        script: what starts it.
        path: where the script is kept, beside the run.
    """

    settings: Settings
    script: str
    path: Path


def prepare(
    words: Sequence[str],
    config_dir: str | None,
    command: str,
    *,
    chain: int = 1,
    starts: bool = True,
    with_files: bool = True,
) -> Submission:
    """Check the whole configuration for the launch it asks for, and make the script's text.

    Args:
        words: of the command line, such as `nodes=64` or `experiment=kanana_2_tiny`.
        config_dir: folder with more config groups.
        command: what was typed.
        chain: jobs to submit.
        starts: whether the run is to be started from here, and not looked at only.
        with_files: whether files that the settings name must be there.

    Raises:
        ConfigurationError: with all the problems found.
    """
    overrides = [f"cluster.{word}" if word.split("=")[0] in _SHORT else word for word in words]
    cluster = cluster_settings(overrides, config_dir) or ClusterSettings()
    # Looking at this machine loads torch, for seconds.
    here = Environment() if _of_other_machines(cluster, starts) else detect_environment()
    environment = launch_environment(cluster, here, starts=starts)
    problems = list(check_submission(cluster, overrides, chain=chain, starts=starts))
    try:
        settings = load_settings(overrides, environment, config_dir, with_files=with_files)
    except ConfigurationError as error:
        raise ConfigurationError([*error.problems, *problems]) from error
    if problems:
        raise ConfigurationError(problems)
    options = ["--config-dir", str(Path(config_dir).absolute())] if config_dir else []
    script = render(
        settings,
        [*options, *overrides],
        command,
        processes=environment.local_world_size,
        chain=chain > 1,
    )
    name = "local.sh" if cluster.kind == "local" else "train.sbatch"
    return Submission(settings, script, records_folder(settings) / name)


def launch_environment(
    cluster: ClusterSettings, here: Environment, *, starts: bool = True
) -> Environment:
    """What the processes will find, on this machine or on the nodes asked for.

    Of the nodes' GPUs nothing is known here, nor of what is installed in a container, nor, where
    the script is only looked at, on the cluster: it is taken to fit, and each process looks again
    when it starts.
    """
    gpus = cluster.gpus_per_node
    if gpus is None:
        gpus = here.cuda_device_count
    launch = dataclasses.replace(cluster, gpus_per_node=gpus)
    if cluster.kind == "slurm":
        here = dataclasses.replace(here, gpu_name=None, compute_capability=None)
        if _of_other_machines(cluster, starts):
            here = Environment(gpu_name=None, compute_capability=None)
    return dataclasses.replace(
        here,
        rank=0,
        world_size=launch.world_size,
        local_world_size=launch.processes_of_a_node,
        cuda_device_count=here.cuda_device_count if cluster.kind == "local" else gpus,
    )


def _of_other_machines(cluster: ClusterSettings, starts: bool) -> bool:
    """Whether nothing here, installed or not, says what the processes will find."""
    return cluster.kind == "slurm" and (cluster.container_image is not None or not starts)


def check_submission(
    cluster: ClusterSettings, overrides: Sequence[str], *, chain: int, starts: bool
) -> Iterator[Problem]:
    """What matters to who submits, and not to the processes of the run."""
    if starts and cluster.kind == "slurm" and shutil.which("sbatch") is None:
        yield Problem(
            "cluster.kind",
            "slurm",
            "there is no sbatch here",
            "submit on a node of the cluster, or look at the script with --dry-run",
        )
    if chain < 1 or (chain > 1 and cluster.kind == "local"):
        reason = "this machine has no queue" if chain > 1 else "is no number of jobs"
        yield Problem("--chain", chain, reason, "choose cluster=slurm and 1 or more")
    image = cluster.container_image
    if image is not None and image.endswith((".sif", ".sqsh")) and not Path(image).is_file():
        yield Problem("cluster.container_image", image, "no such file", "give an existing image")
    if cluster.gpus_per_node and "device=cpu" in overrides:
        yield Problem(
            "cluster.gpus_per_node",
            cluster.gpus_per_node,
            "device = cpu leaves these GPUs idle",
            "set cluster.gpus_per_node=0",
        )


def write(submission: Submission) -> None:
    """Keep the script beside the run."""
    submission.path.parent.mkdir(parents=True, exist_ok=True)
    submission.path.write_text(submission.script, "utf-8")


def start_here(submission: Submission) -> int:
    """Run on this machine; the exit status of the run."""
    return subprocess.run(["bash", str(submission.path)], check=False).returncode


def submit(submission: Submission, chain: int) -> list[int]:
    """Hand the script to sbatch, `chain` times; the numbers of the jobs.

    Raises:
        RuntimeError: sbatch refuses it, with its words.
    """
    command = ["sbatch", "--parsable", str(submission.path)]
    jobs = []
    for _ in range(chain):
        finished = _run(command)
        if finished.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}: {finished.stderr.strip()}")
        jobs.append(int(finished.stdout.split(";")[0]))
    return jobs


def unusable_nodes(settings: Settings) -> list[str]:
    """Nodes that will not be used, each with the reason: a pre-flight's, or SLURM's."""
    lines = [f"{name}: found bad by a pre-flight of this run" for name in excluded_nodes(settings)]
    partition = settings.cluster.partition
    options = [f"--partition={partition}"] if partition else []
    sinfo = _run(["sinfo", "--noheader", "--list-reasons", "--format=%n: %t, %E", *options])
    return [*lines, *sorted({line.strip() for line in sinfo.stdout.splitlines()})]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )
