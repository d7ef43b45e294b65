"""A checkpoint that cannot be saved harms no other, gives its space back, and is told clearly.

The disk is a small one of its own (tmpfs), mounted for one process alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kanana.checkpoint.verification import verify_alone
from megatron_kanana.config.exit_status import CANNOT_SAVE
from tests.checkpoints import saved_tensors
from tests.launch import CONFIG_DIR, free_ports, run_python

SCRIPT = "tests/faults/train_with_bad_disk.py"
STEPS = 6
NAMESPACE = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))


@dataclass
class Job:
    """What came of a run.

    Attributes:
        status: it ended with.
        said: by its first rank on standard error.
        checkpoints: their folder.
    """

    status: int
    said: str
    checkpoints: Path

    @property
    def names(self) -> list[str]:
        """What lies there."""
        return sorted(path.name for path in self.checkpoints.iterdir())


def can_mount() -> bool:
    """Whether a process may have a mount of its own."""
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="no disk of its own can be mounted here")


def run_jobs(
    folder: Path,
    cache_dir: Path,
    jobs: Mapping[str, tuple[Mapping[int, tuple[str, str]], Sequence[str]]],
    *,
    disk: Path | None = None,
    processes: int = 1,
) -> dict[str, Job]:
    """Run jobs in turn in the same processes: by name their events and overrides."""
    given, folders = [], {}
    for port, (name, (events, overrides)) in zip(free_ports(len(jobs)), jobs.items(), strict=True):
        folders[name] = folder / name / "checkpoints"
        words = [
            *("--config-dir", str(CONFIG_DIR), "experiment=small", f"run_name={name}"),
            *(f"output_dir={folder}", f"data.cache_dir={cache_dir}", f"stop_after_step={STEPS}"),
            *("checkpoint.save_interval=2", "checkpoint.keep_last=10", *overrides),
        ]
        job: dict[str, Any] = {"port": port, "events": dict(events), "arguments": words}
        if disk is not None:
            folders[name] = folder / f"kept_{name}" / "checkpoints"
            job |= {"disk": str(disk), "kept": str(folder / f"kept_{name}")}
            words.append(f"checkpoint.directory={disk}/checkpoints")
        given.append(job)
    behind = NAMESPACE if disk is not None else ()
    finished = run_python(SCRIPT, json.dumps(given), processes=processes, behind=behind)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(jobs), finished.stdout + finished.stderr
    return {
        name: Job(**json.loads(line), checkpoints=folders[name])
        for name, line in zip(jobs, lines, strict=True)
    }


def same_end(checkpoints: Path, others: Path) -> bool:
    """Whether both runs ended with the same state, bit by bit."""
    ends = [saved_tensors(folder / f"step_{STEPS:08d}") for folder in (checkpoints, others)]
    return ends[0].keys() == ends[1].keys() and all(
        torch.equal(ends[0][name], ends[1][name]) for name in ends[0]
    )


@needs_mount
def test_full_or_read_only_disk_costs_the_save_alone(tmp_path: Path, cache_dir: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    full, middle = f"{disk}/full", 9_400_000  # tensors have 8.8 million bytes, files 9.9
    jobs = run_jobs(
        tmp_path,
        cache_dir,
        {
            "undisturbed": ({}, ["checkpoint.asynchronous=true"]),
            "background": (
                {4: ("fill", f"{full}:{middle}"), 6: ("free", full)},
                ["checkpoint.asynchronous=true"],
            ),
            "foreground": ({4: ("fill", f"{full}:{middle}")}, ["checkpoint.on_save_failure=stop"]),
            "no room": (
                {4: ("fill", f"{full}:1000000")},
                ["checkpoint.asynchronous=true", "checkpoint.max_failed_saves=2"],
            ),
            "read only": ({4: ("read only", str(disk)), 6: ("writable", str(disk))}, []),
        },
        disk=disk,
    )
    whole = ["step_00000002", "step_00000004", "step_00000006"]
    assert jobs["undisturbed"].names == whole
    for name in ("background", "read only"):
        job = jobs[name]
        assert job.status == 0, job.said
        assert job.names == [whole[0], whole[2]]
        assert same_end(job.checkpoints, jobs["undisturbed"].checkpoints)
        assert "training goes on (1 of at most 3 failed saves in a row)" in job.said
    for name, saves in {"foreground": 1, "no room": 2}.items():
        job = jobs[name]
        assert job.status == CANNOT_SAVE, job.said
        assert job.names == whole[:1]
        assert job.said.count("could not be saved") == saves
        assert "the run stops" in job.said
    for job in jobs.values():
        assert [verify_alone(job.checkpoints / name) for name in job.names] == [[]] * len(job.names)
        assert "Traceback" not in job.said
    for name in ("background", "foreground"):
        assert re.search(
            rf"rank 0: {disk}/checkpoints/step_00000004\.partial/\S+: No space left on device"
            r" \(\d\S* \w+ free\)",
            jobs[name].said,
        )
    assert re.search(
        rf"{disk}/checkpoints has \S+ \w+ free, and the checkpoint takes 8.79 MB",
        jobs["no room"].said,
    )
    assert "step_00000004.partial: Read-only file system" in jobs["read only"].said
    for name in ("background", "foreground", "no room", "read only"):
        assert f"the checkpoint before, {disk}/checkpoints/{whole[0]}, is as it was" in (
            jobs[name].said
        )
        assert "remedy: make room there" in jobs[name].said
