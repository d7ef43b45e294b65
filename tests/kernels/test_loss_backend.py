"""Which backend the losses take."""

from __future__ import annotations

import logging

import pytest

from megatron_kanana.kernels.linear_cross_entropy.backend import (
    choose_fp8_output_layer,
    choose_loss_backend,
)

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


def test_the_output_layer_is_in_fp8_where_it_was_asked_for_and_can_be(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert not choose_fp8_output_layer("bf16", "csrc", "cuda")
    assert not choose_fp8_output_layer("fp8", "csrc", "cpu")
    assert "output layer without fp8 (a CPU has none)" in caplog.text
    assert choose_fp8_output_layer("fp8", "csrc", "cuda")
    assert "output layer in fp8 (asked for by precision.output_layer)" in caplog.text
    with pytest.raises(
        RuntimeError, match=r"precision.output_layer = fp8: kernels.loss_backend is torch"
    ):
        choose_fp8_output_layer("fp8", "torch", "cuda")
    monkeypatch.setattr(f"{MODULE}.has_operation_for", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"precision.output_layer = fp8: .*build them again"):
        choose_fp8_output_layer("fp8", "csrc", "cuda")
