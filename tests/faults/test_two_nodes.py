"""Two processes as two nodes: a fault of one is known to both, and each has a disk of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_kanana.checkpoint.local_tier import run_folder
from megatron_kanana.config.exit_status import WRONG_CONFIGURATION
from tests.faults.damage import settings_of_run
from tests.faults.test_failed_saves import Job, run_jobs, same_end

BOTH = ("checkpoint.asynchronous=true", "parallel.tensor_parallel_size=2")
PART = "rank_{0:05d}_of_00002/step_00000005"


def with_local_tier(folder: Path, *overrides: str) -> Sequence[str]:
    """Settings by which process 1 keeps its state in another folder than process 0."""
    local = f"checkpoint.local_directory={folder}/local/node_{{rank}}"
    return [*BOTH, local, "checkpoint.local_save_interval=1", *overrides]


def part(folder: Path, name: str, rank: int) -> Path:
    """What a process has kept of a run."""
    local = f"{folder}/local/node_{rank}"
    return run_folder(local, settings_of_run(folder, name)) / PART.format(rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def begun(folder: Path, cache_dir: Path) -> dict[str, Job]:
    """A run that nothing happens to, one that is cut off, and one whose writer is killed."""
    return run_jobs(
        folder,
        cache_dir,
        {
            "undisturbed": ({}, BOTH),
            "cut_off": ({}, with_local_tier(folder, "stop_after_step=5")),
            "writer_killed": ({4: ("kill writer", "1")}, BOTH),
        },
        processes=2,
    )


def test_killed_writer_of_one_rank_costs_the_save_alone(begun: dict[str, Job]) -> None:
    job = begun["writer_killed"]
    assert "rank 1: the process that wrote was ended by SIGKILL" in job.said
    assert "training goes on (1 of at most 3 failed saves in a row)" in job.said
    assert job.status == 0
    assert job.names == ["step_00000002", "step_00000006"]
    assert same_end(job.checkpoints, begun["undisturbed"].checkpoints)


def test_run_goes_on_from_the_newest_state_that_every_node_has(
    begun: dict[str, Job], folder: Path, cache_dir: Path
) -> None:
    assert begun["cut_off"].names == ["step_00000002", "step_00000004", "step_00000005"]
    # It would not have come to this last checkpoint if it had been killed.
    shutil.rmtree(begun["cut_off"].checkpoints / "step_00000005")
    for name in ("whole", "new_disk", "damaged", "other_layout"):
        shutil.copytree(folder / "cut_off", folder / name)
        for rank in range(2):
            if (name, rank) != ("new_disk", 1):
                shutil.copytree(part(folder, "cut_off", rank), part(folder, name, rank))
    state = part(folder, "damaged", 1) / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 4
    state.write_bytes(content)

    shutil.copytree(folder / "cut_off", folder / "lost")
    for step in ("step_00000002", "step_00000004"):
        (folder / "lost" / "checkpoints" / step / "__1_0.distcp").unlink()

    alike = ("whole", "new_disk", "damaged")
    jobs: dict[str, Any] = {name: ({}, with_local_tier(folder)) for name in alike}
    other = with_local_tier(folder, "parallel.tensor_parallel_size=1")
    jobs |= {"other_layout": ({}, other), "lost": ({}, BOTH)}
    ended = run_jobs(folder, cache_dir, jobs, processes=2)
    assert f"loaded {part(folder, 'whole', 0)}: step 5," in ended["whole"].said
    for name in ("new_disk", "damaged", "other_layout"):
        assert f"loaded {ended[name].checkpoints}/step_00000004: step 4," in ended[name].said
    assert "step 5 is not used: rank 1 has no part of it" in ended["new_disk"].said
    assert "rank 1's state.pt has another content than what was saved" in ended["damaged"].said
    for rank in range(2):
        assert part(folder, "damaged", rank).with_suffix(".damaged").is_dir()
    assert ended["lost"].status == WRONG_CONFIGURATION
    assert f"No checkpoint in {ended['lost'].checkpoints} is whole" in ended["lost"].said
    assert ended["lost"].said.count("__1_0.distcp is missing") == 2
    assert "Traceback" not in ended["lost"].said
    assert ended["lost"].names == ["step_00000002", "step_00000004"]
    for name in alike:
        assert same_end(ended[name].checkpoints, begun["undisturbed"].checkpoints)
