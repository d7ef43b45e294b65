"""The script that starts a run: of sbatch on a cluster, of bash on this machine.

`train.sbatch.jinja` and `local.sh.jinja` beside this file are what a person reads; here are the
values that go into them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from megatron_kanana.config import Settings
from megatron_kanana.config.check_cluster import time_limit_seconds
from megatron_kanana.config.exit_status import (
    END_TIME,
    HUNG,
    SAVED_FOR_ANOTHER_START,
    SAVED_FOR_GOOD,
)
from megatron_kanana.config.watchdog_settings import HANGS

from .record import PROJECT

RECORDS = "cluster"
"""In the run's folder: script, logs, pre-flights and environments."""

EXCLUDED_NODES = "excluded_nodes"
"""In `RECORDS`: nodes that a pre-flight found bad, one a line."""


def records_folder(settings: Settings) -> Path:
    """Where script and records of a run are kept."""
    return Path(settings.run_dir).absolute() / RECORDS


def excluded_nodes(settings: Settings) -> list[str]:
    """Nodes that an earlier pre-flight of this run found bad."""
    path = records_folder(settings) / EXCLUDED_NODES
    return sorted(set(path.read_text("utf-8").split())) if path.is_file() else []


def render(
    settings: Settings, arguments: Sequence[str], command: str, *, processes: int, chain: bool
) -> str:
    """The script of a run.

    Args:
        settings: the checked configuration.
        arguments: of the main job.
        command: what was typed to get the script, for whoever reads it.
        processes: of each node.
        chain: whether several jobs are submitted, of which one runs at a time.
    """
    cluster = settings.cluster
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        comment_start_string="{=#",  # bash has {# in the length of an array
        comment_end_string="#=}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    template = "local.sh.jinja" if cluster.kind == "local" else "train.sbatch.jinja"
    return environment.get_template(template).render(
        run_name=settings.run_name,
        command=command,
        directives=_directives(settings, processes, chain=chain),
        project=PROJECT,
        records=records_folder(settings),
        setup=cluster.setup,
        variables=cluster.variables,
        python=cluster.python or (sys.executable if cluster.container == "none" else "python3"),
        nodes=cluster.nodes,
        processes=processes,
        launcher=cluster.launcher,
        container=cluster.container,
        container_options=_container_options(settings),
        in_step=' "${container[@]}"' if cluster.container == "pyxis" else "",
        inside='"${inside[@]}" ' if cluster.container == "apptainer" else "",
        preflight=_preflight_options(settings) if cluster.preflight.enabled else None,
        excluded=_as_file(cluster.exclude),
        arguments=arguments,
        chain=chain,
        requeue=cluster.requeue,
        restarts=cluster.restarts,
        end_time=END_TIME,
        time_limit_seconds=time_limit_seconds(cluster.time_limit),
        checkpoints=Path(settings.checkpoint_dir).absolute(),
        hangs=Path(settings.run_dir).absolute() / HANGS,
        hung_status=HUNG,
        saved_for_another_start=SAVED_FOR_ANOTHER_START,
        saved_for_good=SAVED_FOR_GOOD,
    )


def _directives(settings: Settings, processes: int, *, chain: bool) -> list[str]:
    """Options of sbatch, as the script names them."""
    cluster = settings.cluster
    exclude = sorted({*cluster.exclude, *excluded_nodes(settings)})
    options = {
        "job-name": settings.run_name,
        "nodes": cluster.nodes + cluster.spare_nodes,
        "ntasks-per-node": processes,
        "gres": f"gpu:{cluster.gpus_per_node}" if cluster.gpus_per_node else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time_limit,
        "signal": f"B:USR1@{cluster.signal_seconds}",
        "exclude": ",".join(exclude) or None,
        "dependency": "singleton" if chain else None,
        "output": records_folder(settings) / "%j.log",
        "open-mode": "append",
    }
    written = [f"--{name}={_quoted(value)}" for name, value in options.items() if value is not None]
    return [*written, "--requeue" if cluster.requeue else "--no-requeue", *cluster.sbatch_options]


def _quoted(value: object) -> str:
    """As sbatch reads it: in quotes where there is a space."""
    return f'"{value}"' if " " in str(value) else str(value)


def _as_file(nodes: Sequence[str]) -> str:
    """One more file for a command to read, with nodes that are never used."""
    return f" <(printf '%s\\n' {shlex.join(nodes)})" if nodes else ""


def _container_options(settings: Settings) -> str:
    """Options of srun (pyxis), or the command before the process (apptainer)."""
    cluster = settings.cluster
    folders = [str(PROJECT), *_folders(settings), str(Path(settings.data.cache_dir).absolute())]
    mounts = [*(f"{folder}:{folder}" for folder in folders), *cluster.container_mounts]
    joined, image = ",".join(dict.fromkeys(mounts)), str(cluster.container_image)
    if cluster.container == "pyxis":
        options = [f"--container-image={image}", f"--container-mounts={joined}"]
        return _in_quotes([*options, f"--container-workdir={PROJECT}"])
    return "apptainer exec --nv " + _in_quotes([f"--bind={joined}", f"--pwd={PROJECT}", image])


def _in_quotes(words: Sequence[str]) -> str:
    """Words of an array of the shell, where a comma looks like a mistake outside quotes."""
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)


def _folders(settings: Settings) -> list[str]:
    """Folders the run writes to."""
    return [str(Path(path).absolute()) for path in (settings.run_dir, settings.checkpoint_dir)]


def _preflight_options(settings: Settings) -> list[str]:
    """Options of `preflight.py`, as lines."""
    cluster, limits = settings.cluster, settings.cluster.preflight
    return [
        f"--gpus {cluster.gpus_per_node or 0} --timeout {limits.timeout:g}",
        f"--folders {shlex.join(_folders(settings))}",
        f"--minimum-free-disk {limits.minimum_free_disk:g}"
        f" --maximum-clock-difference {limits.maximum_clock_difference:g}",
        f"--minimum-bandwidth {limits.minimum_bandwidth:g}"
        f" --bandwidth-size {limits.bandwidth_size:g}",
    ]
