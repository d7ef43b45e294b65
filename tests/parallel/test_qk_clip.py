"""QK-Clip where megatron-core's own falls short.

That one clips no multi-token prediction layer, cannot work on sharded fp32 weights, clips after
skipped steps, counts forwards of evaluation, and takes one collective a layer.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import run_python

SCRIPT = "tests/parallel/plant_heads.py"
# A learning rate that changes no weight, so that what changes is QK-Clip's doing.
STILL = (
    "optimizer.learning_rate=1.0e-30",
    "optimizer.weight_decay=0",
    "schedule.minimum_learning_rate=0",
    "schedule.global_batch_size=2",
    "data.sequence_length=32",
    "optimizer.qk_clip_threshold=100",
    "model.num_mtp_layers=1",
)
LAYOUTS = {
    "heads split over two processes, AdamW, low-rank queries": (
        "optimizer=adamw",
        "parallel.tensor_parallel_size=2",
    ),
    "fp32 weights of bf16 ones sharded over two processes, Muon, direct queries": (
        "optimizer=muon",
        "precision.compute=bf16",
        "model.q_lora_rank=null",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planted_heads_are_clipped_after_applied_training_steps_only(
    layout: str, tmp_path: Path, cache_dir: Path
) -> None:
    finished = run_python(
        *(
            SCRIPT,
            *LAYOUTS[layout],
            *STILL,
            f"output_dir={tmp_path}",
            f"data.cache_dir={cache_dir}",
        ),
        processes=2,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
