"""Machines that the choice of a backend is tried on."""

from __future__ import annotations

import pytest

CHOOSERS = (
    "megatron_kanana.kernels.linear_cross_entropy.backend",
    "megatron_kanana.kernels.moe.backend",
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a Hopper GPU and the operations were compiled for it."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for module in CHOOSERS:
        monkeypatch.setattr(f"{module}.has_operation_for", lambda *_: True)
