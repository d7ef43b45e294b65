"""Muon's rule for one weight: momentum, orthogonal direction, scale.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon
is scalable for LLM training" (Moonlight, arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .orthogonalize import orthogonalize


def nesterov_momentum(
    gradient: torch.Tensor, momentum: torch.Tensor, decay: float, dtype: torch.dtype
) -> torch.Tensor:
    """Add the gradient to the momentum in place, and look one step ahead.

    momentum <- decay * momentum + gradient; returns gradient + decay * momentum in `dtype`, each
    computed in the momentum's format in one pass.
    """
    torch.add(gradient, momentum, alpha=decay, out=momentum)
    ahead = torch.empty_like(momentum, dtype=dtype)
    return torch.add(gradient, momentum, alpha=decay, out=ahead)


def update_scale(mode: str, rows: int, columns: int) -> float:
    """Factor on the orthogonal direction of a [rows, columns] matrix.

    Args:
        mode: 'match_adamw', 0.2 * sqrt(max(rows, columns)): elements have the root mean square 0.2
            that AdamW's updates have, so that both share a learning rate (Moonlight, equation 4);
            'jordan', sqrt(max(1, rows / columns)): Keller Jordan's; or 'spectral',
            sqrt(rows / columns): outputs of root mean square 1 for such inputs (arXiv 2310.17813).

    Raises:
        ValueError: another mode.
    """
    if mode == "match_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if mode == "jordan":
        return math.sqrt(max(1.0, rows / columns))
    if mode == "spectral":
        return math.sqrt(rows / columns)
    raise ValueError(f"mode is match_adamw, jordan or spectral; got {mode!r}")


def directions(
    matrices: Sequence[torch.Tensor], method: str, steps: int, scale_mode: str
) -> list[torch.Tensor]:
    """Scaled orthogonal direction of each matrix; those of one shape are computed as one batch.

    Args:
        matrices: momenta looking ahead, [number, rows, columns] each.
        method, steps: as for `orthogonalize`.
        scale_mode: as for `update_scale`.

    Returns:
        tensors of the same shapes and dtypes; the learning rate is not applied.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape[1:], []).append(index)
    result: list[torch.Tensor] = [torch.empty(0)] * len(matrices)
    for (rows, columns), indices in by_shape.items():
        batch = torch.cat([matrices[index] for index in indices])
        batch = orthogonalize(batch, method, steps).mul_(update_scale(scale_mode, rows, columns))
        numbers = [len(matrices[index]) for index in indices]
        for index, part in zip(indices, batch.split(numbers), strict=True):
            result[index] = part
    return result
