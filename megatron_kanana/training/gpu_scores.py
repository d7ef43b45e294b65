"""Slow GPUs by nvidia-resiliency-ext, where that is installed.

Its detector times the kernels of a step by CUPTI, leaves out NCCL's, and gives each process a score
beside the fastest: 1 is as fast, 0.5 half as fast.
"""

from __future__ import annotations

import importlib
import logging
from contextlib import AbstractContextManager
from typing import Any

import torch

logger = logging.getLogger(__name__)


class GpuScores:
    """The detector of this process; there is one at most.

    Args:
        detector: `nvidia_resiliency_ext.straggler.Detector`.
    """

    def __init__(self, detector: Any) -> None:
        self._detector = detector
        if not detector.initialized:
            detector.initialize(scores_to_compute=["relative_perf_scores"], gather_on_rank0=True)

    def timed(self) -> AbstractContextManager[None]:
        """Time the kernels that are launched inside."""
        section: AbstractContextManager[None] = self._detector.detection_section("step")
        return section

    def slow(self, factor: float) -> dict[int, str]:
        """Hosts by rank of GPUs that take `factor` times the fastest one's time, on rank 0.

        Every process must call this; elsewhere nothing is known.
        """
        report = self._detector.generate_report()
        if report is None or not report.gpu_relative_perf_scores:
            return {}
        found = report.identify_stragglers(gpu_rel_threshold=1.0 / factor)
        return {each.rank: each.node for each in found["straggler_gpus_relative"]}


def gpu_scores(device: torch.device) -> GpuScores | None:
    """The detector for a GPU; None on a CPU and where nvidia-resiliency-ext cannot be used.

    It is built for one version of CUPTI, which torch for another version of CUDA does not bring.
    """
    if device.type != "cuda":
        return None
    try:
        package = importlib.import_module("nvidia_resiliency_ext.straggler")
    except ImportError:
        return None
    try:
        return GpuScores(package.Detector)
    except (ImportError, RuntimeError) as error:
        logger.info("nvidia-resiliency-ext cannot time kernels here: %s", error)
        return None
