"""Which backend the losses take."""

from __future__ import annotations

import logging

import pytest

from megatron_kanana.kernels.linear_cross_entropy.backend import choose_loss_backend

MODULE = "megatron_kanana.kernels.linear_cross_entropy.backend"


def test_auto_takes_the_compiled_operations_where_they_run(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_loss_backend("auto", "cpu") == "csrc"
    assert "kernels of the loss: csrc (compiled operations found)" in caplog.text
    assert choose_loss_backend("torch", "cpu") == "torch"
    assert choose_loss_backend("csrc", "cuda") == "csrc"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert choose_loss_backend("auto", "cuda") == "torch"
    assert "torch (a GPU is no Hopper GPU (compute capability 9.0))" in caplog.text


def test_what_was_asked_for_and_cannot_run_is_refused_by_name(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    with pytest.raises(RuntimeError, match=r"kernels.loss_backend = csrc: a GPU is no Hopper GPU"):
        choose_loss_backend("csrc", "cuda")
    monkeypatch.setattr(f"{MODULE}.has_operation_for", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"kernels.loss_backend = csrc: .*build them again"):
        choose_loss_backend("csrc", "cpu")
