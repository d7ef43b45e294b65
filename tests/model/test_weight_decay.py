"""Which parameters weight decay touches."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints import saved_tensors
from tests.launch import train

RATE = 5e-4  # at step 1 of the small experiment: half of its peak, after one of two warm-up steps
DECAY = 100.0


def weights_after_one_step(
    folder: Path, cache_dir: Path, *overrides: str
) -> dict[str, torch.Tensor]:
    """Weights by checkpoint name."""
    name = "run" + "_".join(overrides).replace("=", "_")
    train(folder, cache_dir, name, "stop_after_step=1", *overrides)
    tensors = saved_tensors(folder / name / "checkpoints" / "step_00000001")
    return {key: value for key, value in tensors.items() if not key.startswith("optimizer")}


def test_norms_decay_only_if_asked_for(tmp_path: Path, cache_dir: Path) -> None:
    none = weights_after_one_step(tmp_path, cache_dir, "optimizer.weight_decay=0")
    decay = f"optimizer.weight_decay={DECAY}"
    matrices = weights_after_one_step(tmp_path, cache_dir, decay)
    everything = weights_after_one_step(tmp_path, cache_dir, decay, "optimizer.decay_norms=true")
    norms = [name for name in none if "norm" in name]
    assert len(norms) >= 3
    for name in norms:
        assert torch.equal(matrices[name], none[name])
        # Gains start at one, and decoupled decay takes rate x decay of them.
        lost = none[name] - everything[name]
        torch.testing.assert_close(lost, torch.full_like(lost, RATE * DECAY), rtol=1e-4, atol=0)
    head = "output_layer.weight"
    assert not torch.equal(matrices[head], none[head])
    assert torch.equal(matrices[head], everything[head])
