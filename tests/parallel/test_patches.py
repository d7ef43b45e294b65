"""Every patch is still needed: without it, training with experts, loading or saving fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kanana.device.patches import CPU_PATCHES, NO_TRANSFORMER_ENGINE_PATCHES
from tests.launch import CONFIG_DIR, Finished, run_python

SCRIPT = "tests/parallel/train_without_patch.py"
ONLY_WITH_EXPERT_PARALLELISM = {"split_sizes_as_arrays"}
PATCHES = [patch.name for patch in (*CPU_PATCHES, *NO_TRANSFORMER_ENGINE_PATCHES)]


def train_without(
    patch: str, folder: Path, cache_dir: Path, *overrides: str, processes: int = 1
) -> Finished:
    """Train on a CPU and save, with one patch left out."""
    return run_python(
        *(SCRIPT, patch, "--config-dir", str(CONFIG_DIR), "experiment=small", "device=cpu"),
        *(f"data.cache_dir={cache_dir}", f"output_dir={folder}", *overrides),
        processes=processes,
    )


def go_on_without(patch: str, folder: Path, cache_dir: Path, processes: int) -> Finished:
    """Load a checkpoint, train one step on `processes`, save."""
    return train_without(
        *(patch, folder, cache_dir, "stop_after_step=2"),
        f"run_name=without_{patch}_{processes}",
        f"checkpoint.load={folder}/start/checkpoints/step_00000001",
        f"parallel.expert_parallel_size={processes}",
        processes=processes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A folder with a checkpoint to load, made with every patch; and the proof that all is well."""
    folder = tmp_path_factory.mktemp("patches")
    start = train_without("none", folder, cache_dir, "run_name=start", "stop_after_step=1")
    assert start.returncode == 0, start.stderr
    for processes in (1, 2):
        finished = go_on_without("none", folder, cache_dir, processes)
        assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize("patch", PATCHES)
def test_training_fails_without(patch: str, folder: Path, cache_dir: Path) -> None:
    processes = 2 if patch in ONLY_WITH_EXPERT_PARALLELISM else 1
    finished = go_on_without(patch, folder, cache_dir, processes)
    assert finished.returncode != 0
    assert "Error" in finished.stderr
    checkpoints = folder / f"without_{patch}_{processes}" / "checkpoints"
    assert not (checkpoints / "step_00000002").exists()
