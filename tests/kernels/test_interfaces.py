"""Kernels can be used elsewhere: their interfaces need torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "modules",
    [
        "megatron_kanana.kernels.attention, megatron_kanana.kernels.backend",
        "megatron_kanana.kernels.moe, megatron_kanana.kernels.moe.backend",
        "megatron_kanana.kernels.linear_cross_entropy, "
        "megatron_kanana.kernels.linear_cross_entropy.backend",
    ],
)
def test_the_interface_needs_torch_alone(modules: str) -> None:
    code = f"import sys, {modules};print(*{{name.partition('.')[0] for name in sys.modules}})"
    finished = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    imported = set(finished.stdout.split())
    assert "torch" in imported
    assert not imported & {"megatron", "hydra", "omegaconf", "transformer_engine", "cudnn"}
