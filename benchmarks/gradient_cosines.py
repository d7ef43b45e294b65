"""How alike the directions of gradients are, layer by layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

import torch

PIECE = 2**26  # numbers


def layer_cosines(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Cosines of gradients, by layer all its parameters together, else by parameter.

    Args:
        ours: gradients by the parameters' names.
        theirs: the same ones' of another model.
    """
    parts: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for name, their_gradient in theirs.items():
        found = re.match(r".*layers\.\d+", name)
        of_ours, of_theirs = parts[found.group() if found else name]
        of_ours.append(ours[name].flatten())
        of_theirs.append(their_gradient.flatten())
    return {layer: cosine(torch.cat(a), torch.cat(b)) for layer, (a, b) in parts.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the angle between two vectors, in float64, a piece at a time in memory."""
    between = of_a = of_b = 0.0
    for piece_a, piece_b in zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True):
        x, y = piece_a.double(), piece_b.double()
        between, of_a, of_b = between + float(x @ y), of_a + float(x @ x), of_b + float(y @ y)
    return between / math.sqrt(of_a * of_b)
