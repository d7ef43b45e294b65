"""What differs between versions of megatron-core, as far as any of them can show it."""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import pytest
import torch

from megatron_kanana.device import compatibility


@pytest.mark.parametrize(
    ("version", "device", "patches"),
    [
        ("0.16.1", "cpu", compatibility.OLDER_PATCHES),
        ("0.19.2", "cuda", compatibility.NEWER_PATCHES),
        ("0.19.2", "cpu", (*compatibility.NEWER_PATCHES, *compatibility.NEWER_CPU_PATCHES)),
    ],
)
def test_patches_are_those_of_the_version(
    version: str, device: str, patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert compatibility.version_patches(device) == patches


class _Part:
    def __init__(self, size: int, *, width: int, submodules: str) -> None:
        self.built = (size, width, submodules)


def test_a_specification_builds_without_the_new_arguments() -> None:
    spec = types.SimpleNamespace(module=_Part, params={"width": 2}, submodules="parts")
    built = compatibility.build_from_specification(spec, 1, name="a.b", is_mtp_layer=True)
    assert built.built == (1, 2, "parts")


@pytest.mark.parametrize("sums", [False, True])
def test_losses_of_prediction_layers_weigh_what_they_should(
    sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer.multi_token_prediction import (
        MTPLossAutoScaler,
        MTPLossLoggingHelper,
    )

    monkeypatch.setattr(gpt_model, "process_mtp_loss", None, raising=False)
    monkeypatch.setattr(MTPLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    monkeypatch.setattr(MTPLossLoggingHelper, "tracker", {})
    (patch,) = (
        each for each in compatibility.NEWER_PATCHES if each.name == "losses_of_prediction_layers"
    )
    patch.apply()
    length, batch, width, layers = 5, 2, 3, 2
    dice = torch.Generator().manual_seed(0)
    states = torch.randn((1 + layers) * length, batch, width, generator=dice, requires_grad=True)
    labels = torch.randint(7, (batch, length), generator=dice)
    mask = (torch.rand(batch, length, generator=dice) < 0.7).float()

    def losses(of: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (of * values.square().sum(-1).t()).float()

    own = gpt_model.process_mtp_loss(
        hidden_states=states,
        labels=labels,
        loss_mask=mask,
        output_layer=lambda values: (values, None),
        compute_language_model_loss=losses,
        config=types.SimpleNamespace(
            mtp_num_layers=layers, mtp_loss_scaling_factor=0.3, calculate_per_token_loss=sums
        ),
        cp_group=None,
    )
    own.sum().backward()

    assert torch.equal(own, states[:length])
    assert states.grad is not None
    expected = [torch.ones(length, batch, width)]
    for layer in range(1, layers + 1):
        weight = torch.zeros(batch, length)
        weight[:, : length - layer] = (mask * labels)[:, layer:]
        count = mask[:, layer:].sum()
        values = states.detach()[layer * length : (layer + 1) * length]
        share = 0.15 if sums else 0.15 / count
        expected.append(share * 2 * values * weight.t()[..., None])
        noted = (weight.t() * values.square().sum(-1)).sum() / count
        torch.testing.assert_close(MTPLossLoggingHelper.tracker["values"][layer - 1], noted)
    torch.testing.assert_close(states.grad, torch.cat(expected))
