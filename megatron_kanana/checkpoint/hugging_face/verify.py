"""Whether a Hugging Face folder and a checkpoint hold the same model, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .architecture import FIELDS, YARN_FIELDS
from .to_hugging_face import MegatronModel
from .to_megatron import HuggingFaceModel


def differences(
    hugging_face: HuggingFaceModel,
    megatron: MegatronModel,
    on_bytes: Callable[[int], None] | None = None,
) -> list[str]:
    """Settings and tensors that differ, a line each; none if both hold the same model.

    Raises:
        ConversionError: one of them is damaged.
    """
    theirs, ours = hugging_face.settings.model, megatron.settings
    compared = [*FIELDS, "num_mtp_layers", "rotary_base", "yarn_factor"]
    if ours.yarn_factor > 1:
        compared += YARN_FIELDS
    found = [
        f"model.{name} = {getattr(theirs, name)} in {hugging_face.folder},"
        f" {getattr(ours, name)} in {megatron.folder}"
        for name in dict.fromkeys(compared)
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if found:
        return found
    for placement in megatron.placements:
        here = megatron.read(placement)
        there = hugging_face.source.read(placement.hugging_face)
        if there.dtype != here.dtype:
            found.append(
                f"{placement.hugging_face} is {there.dtype}, our {placement.megatron} {here.dtype}"
            )
        elif not torch.equal(there.view(-1).view(torch.uint8), here.view(-1).view(torch.uint8)):
            count = int((there != here).sum())
            found.append(f"{placement.hugging_face} differs in {count} of {here.numel()} numbers")
        if on_bytes is not None:
            on_bytes(here.nbytes)
    return found
