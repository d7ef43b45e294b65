"""Every patch is still needed: without it, training with experts, loading or saving fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kanana.device.compatibility import version_patches
from megatron_kanana.device.patches import CPU_PATCHES, NO_TRANSFORMER_ENGINE_PATCHES
from tests.launch import CONFIG_DIR, Finished, run_python

SCRIPT = "tests/parallel/train_without_patch.py"
NORMS_COMPUTED_AGAIN = ("parallel.recompute=selective", "parallel.recompute_parts=[norms]")
# Settings, on two processes, under which these are missed; the others are on one process.
ONLY_WITH = {
    "tensor_cuda": ("parallel.pipeline_parallel_size=2", "model.num_mtp_layers=1"),
    "recompute_without_fp8": NORMS_COMPUTED_AGAIN,
    "recompute_without_compiler": NORMS_COMPUTED_AGAIN,
    "no_query_norm": ("model.q_lora_rank=null",),
    "losses_of_prediction_layers": ("parallel.tensor_parallel_size=2", "model.num_mtp_layers=1"),
}
STARTS = {"start": "model.num_mtp_layers=0"} | {
    f"start_{index}": change
    for index, change in enumerate(("model.num_mtp_layers=1", "model.q_lora_rank=null"))
}
PATCHES = [
    patch.name for patch in (*CPU_PATCHES, *NO_TRANSFORMER_ENGINE_PATCHES, *version_patches("cpu"))
]


def train_without(
    patch: str, folder: Path, cache_dir: Path, *overrides: str, processes: int = 1
) -> Finished:
    """Train on a CPU and save, with one patch left out."""
    return run_python(
        *(SCRIPT, patch, "--config-dir", str(CONFIG_DIR), "experiment=small", "device=cpu"),
        *(f"data.cache_dir={cache_dir}", f"output_dir={folder}", *overrides),
        processes=processes,
    )


def go_on_without(
    patch: str, folder: Path, cache_dir: Path, overrides: tuple[str, ...] = ()
) -> Finished:
    """Load a checkpoint, train one step, on two processes if there are overrides, and save."""
    name = next((name for name, change in STARTS.items() if change in overrides), "start")
    start = f"{folder}/{name}/checkpoints/step_00000001"
    return train_without(
        *(patch, folder, cache_dir, "stop_after_step=2", f"run_name={run_name(patch, overrides)}"),
        *(f"checkpoint.load={start}", *overrides),
        processes=2 if overrides else 1,
    )


def run_name(patch: str, overrides: tuple[str, ...]) -> str:
    """Name of the run without a patch."""
    return f"without_{patch}_{sum(map(len, overrides))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A folder with a checkpoint to load, made with every patch; and the proof that all is well."""
    folder = tmp_path_factory.mktemp("patches")
    needed = {(), *(ONLY_WITH.get(patch, ()) for patch in PATCHES)}
    for name, change in STARTS.items():
        if name == "start" or any(change in overrides for overrides in needed):
            words = (f"run_name={name}", "stop_after_step=1", change)
            start = train_without("none", folder, cache_dir, *words)
            assert start.returncode == 0, start.stderr
    for overrides in needed:
        finished = go_on_without("none", folder, cache_dir, overrides)
        assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def without_compiler(folder: Path) -> Iterator[Path]:
    """The same folder; nothing can be compiled from now on, and nothing is compiled already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no_compiler")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        yield folder


@pytest.mark.parametrize("patch", PATCHES)
def test_training_fails_without(patch: str, without_compiler: Path, cache_dir: Path) -> None:
    overrides = ONLY_WITH.get(patch, ())
    finished = go_on_without(patch, without_compiler, cache_dir, overrides)
    assert finished.returncode != 0
    assert "Error" in finished.stderr
    checkpoints = without_compiler / run_name(patch, overrides) / "checkpoints"
    assert not (checkpoints / "step_00000002").exists()
