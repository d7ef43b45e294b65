"""What the tests of layouts share: the layouts, the runs, and how weights are compared."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from tests.checkpoints import saved_tensors

TOLERANCE = 1e-5
"""Relative, of what fp32 runs are compared by."""
ADAMW_WEIGHTS_TOLERANCE = 1e-4
"""The same, of weights: AdamW divides small gradients by their own size."""

TENSOR = "parallel.tensor_parallel_size=2"
CONTEXT = "parallel.context_parallel_size=2"
PIPELINE = "parallel.pipeline_parallel_size=2"
PIPELINE_OF_3 = "parallel.pipeline_parallel_size=3"
COUNT_EMBEDDINGS = "parallel.embeddings_count_as_layers=true"
VIRTUAL = "parallel.virtual_pipeline_stages=2"
EXPERT = "parallel.expert_parallel_size=2"
EXPERT_TENSOR = "parallel.expert_tensor_parallel_size=2"
OVERLAP = "parallel.overlap_gradient_reduction=true"
RECOMPUTE = "parallel.recompute=full"
RECOMPUTE_PARTS = (
    "parallel.recompute=selective",
    "parallel.recompute_parts=[norms,up_projections,dense_feed_forward]",
)

Layouts = dict[str, tuple[int, tuple[str, ...]]]
"""Number of processes and overrides of the settings, by name."""

LAYOUTS: Layouts = {
    "TP2": (2, (TENSOR,)),
    "PP2": (2, (PIPELINE,)),
    "PP2 with 2 virtual stages": (2, (PIPELINE, VIRTUAL)),
    "PP3 of unequal stages": (3, (PIPELINE_OF_3, COUNT_EMBEDDINGS)),
    "EP2": (2, (EXPERT,)),
    "CP2": (2, (CONTEXT,)),
    "CP2 x EP2": (2, (CONTEXT, EXPERT)),
    "DP2 with the distributed optimizer": (2, ()),
    "DP2 with overlapped reduction": (2, (OVERLAP,)),
    "expert-TP2 with TP2": (2, (TENSOR, EXPERT_TENSOR)),
    "expert-TP2 with DP2": (2, (EXPERT_TENSOR,)),
    "TP2 x PP2": (4, (TENSOR, PIPELINE)),
    "TP2 x EP2": (2, (TENSOR, EXPERT)),
    "PP2 x EP2": (4, (PIPELINE, EXPERT)),
    "TP2 x CP2": (4, (TENSOR, CONTEXT)),
    "EP4 with TP2": (4, (TENSOR, "parallel.expert_parallel_size=4")),
    "EP2 x expert-TP2 with TP2": (4, (TENSOR, EXPERT, EXPERT_TENSOR)),
    "full recomputation": (1, (RECOMPUTE,)),
    "selective recomputation": (1, RECOMPUTE_PARTS),
    "selective recomputation with TP2": (2, (TENSOR, *RECOMPUTE_PARTS)),
}
MUON_LAYOUTS: Layouts = {
    "TP2": (2, (TENSOR,)),
    "PP2": (2, (PIPELINE,)),
    "EP2": (2, (EXPERT,)),
    "DP2": (2, ()),
    "CP2": (2, (CONTEXT,)),
    "TP2 x EP2": (2, (TENSOR, EXPERT)),
    "expert-TP2 with DP2": (2, (EXPERT_TENSOR,)),
    "DP2 x PP2": (4, (PIPELINE,)),
    "TP2 x DP2": (4, (TENSOR,)),
}

MUON = (
    "optimizer=muon",
    "optimizer.learning_rate=1.0e-3",
    "optimizer.qk_clip_threshold=0.02",
    "model.num_mtp_layers=1",
    "schedule.global_batch_size=4",
    "data.sequence_length=32",
)
"""A run of MuonClip that scales heads down in every step, with multi-token prediction."""


def checkpoint(folder: Path, run: str, step: int) -> Path:
    """Folder of a run's checkpoint."""
    return folder / run / "checkpoints" / f"step_{step:08d}"


def weight_differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Of each weight of two checkpoints: norm of the difference over the norm of theirs.

    The optimizer's fp32 weights are compared where there are any.
    """
    our_tensors, their_tensors = _weights(ours), _weights(theirs)
    assert our_tensors.keys() == their_tensors.keys()
    return {
        name: float((our_tensors[name] - whole).norm() / whole.norm().clamp(min=1e-12))
        for name, whole in their_tensors.items()
    }


@functools.lru_cache(maxsize=2)  # many are compared with the same ones
def _weights(path: Path) -> dict[str, torch.Tensor]:
    tensors = saved_tensors(path)
    return {
        name: tensors.get(f"optimizer.state.param.{name}", tensor)
        for name, tensor in tensors.items()
        if not name.startswith("optimizer.")
    }
