"""A checkpoint that is written in the background holds the weights of the step it was asked for.

On a GPU they are copied into page-locked memory, which the process that writes shares.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kanana.config.manifest import read_manifest
from megatron_kanana.config.saved import whole_path
from tests.checkpoints import saved_tensors
from tests.faults.save_beside_training import DELAY_SECONDS, STEPS
from tests.faults.test_determinism_gpu import KERNELS, MODEL, MUON_CLIP
from tests.faults.undisturbed import different_tensors
from tests.launch import CONFIG_DIR, run_python

pytestmark = pytest.mark.gpu


def test_a_save_in_the_background_equals_one_that_training_waits_for(
    tmp_path: Path, cache_dir: Path
) -> None:
    finished = run_python(
        *("-m", "tests.faults.save_beside_training", str(tmp_path)),
        *("--config-dir", str(CONFIG_DIR), "experiment=small", f"output_dir={tmp_path}"),
        *(f"data.cache_dir={cache_dir}", *MODEL, *KERNELS, *MUON_CLIP, "precision=bf16"),
    )
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    print(told)
    blocking, background, later = (
        whole_path(tmp_path / name, step)
        for name, step in (("blocking", STEPS), ("background", STEPS), ("later", 2 * STEPS))
    )
    assert told["trained_seconds"] < DELAY_SECONDS < told["written_seconds"]  # nothing was read yet
    assert read_manifest(background).keys() == read_manifest(blocking).keys()
    expected = saved_tensors(blocking)
    assert list(different_tensors(saved_tensors(background), expected)) == []
    assert len(list(different_tensors(saved_tensors(later), expected))) > len(expected) / 2
