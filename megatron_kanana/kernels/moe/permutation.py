"""The order of rows in which experts compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Permutation:
    """Rows sorted by expert, within an expert by token. All int32.

    Attributes:
        offsets_E1: [experts + 1]; expert e has the rows from offsets[e] to offsets[e + 1].
        slot_of_row_M: [rows], a row's token * K + k.
        row_of_slot_TK: [tokens, K], -1 where the slot's expert is elsewhere.
    """

    offsets_E1: torch.Tensor
    slot_of_row_M: torch.Tensor
    row_of_slot_TK: torch.Tensor
