"""Odd polynomial iterations of degree five on a Hopper GPU, mostly on small Gram matrices.

A step X <- a X + b (X X^T) X + c (X X^T)^2 X is X <- H X with R = X X^T, H = a I + b R + c R^2.
The next step's R is H R H, so that two steps need X only at their ends: X <- H_2 H_1 X. R and H are
symmetric and commute; so do all products among them, and symmetric ones cost half.

Rounding errors of R grow with every step on it: one R serves two steps at most. One R for three, as
in Gram Newton-Schulz (Zhang, Amsel, Chen, Dao, 2026: one restart, after the second of five steps),
lets singular values overshoot to 1.23 where the polynomials end at 1.13. New factors multiply from
the left, H_2 H_1, since only the lower triangle of the product is computed; the other order has up
to twice the error. `python -m benchmarks.gram_rounding` shows both.

Shape suffixes: B batch, M rows, C columns, N rows and K columns of the padded wide matrix.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 256  # below, tiles of 128 x 128 are mostly padding
TILE = 128
# X X^T of a matrix of Frobenius norm 1 has entries of 1e-6, where fp16 loses digits; multiplied by
# 32^2 the largest possible entry is 1024. The first polynomial and the first product undo it.
SCALE = 32.0
# Two steps on one R cost 9 N^2 K + 11 N^3 floating-point operations for five steps in all, one step
# 15 N^2 K + 5 N^3: alike for square matrices, where the form with fewer roundings is taken.
WIDE = 1.25


@functools.cache
def gram_iteration_error(device: torch.device) -> str | None:
    """Why matrices on this device cannot be iterated here, tried once; None if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"{device} is no Hopper GPU"
    try:
        ones = torch.eye(TILE, device=device)[None]
        result = _iterate(ones, [(1.5, -0.5, 0.0)] * 2, norm_factor=1 / TILE**0.5, epsilon=0.0)
        torch.testing.assert_close(result, ones, rtol=0, atol=2e-3)
    except Exception as error:  # Gluon is experimental: any change in it may surface anywhere
        return f"{type(error).__name__}: {error}"
    return None


def can_iterate_on_gram(x: torch.Tensor) -> bool:
    """Whether the matrices of `x` are of a device, dtype and size for `iterate_on_gram`."""
    if not x.is_cuda or x.dtype == torch.float64 or x.numel() == 0:
        return False
    if min(x.shape[-2:]) < SMALLEST_SIDE:
        return False
    error = gram_iteration_error(x.device)
    if error is not None:
        _log_once(f"orthogonalisation by plain products ({error})")
    return error is None


@functools.cache
def _log_once(message: str) -> None:
    logger.info("%s", message)


def iterate_on_gram(
    x_BMC: torch.Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    norm_factor: float,
    epsilon: float,
) -> torch.Tensor:
    """Divide each matrix by norm_factor * ||X||_F + epsilon and iterate.

    Args:
        x_BMC: wide or tall, on a GPU for which `can_iterate_on_gram`.
        coefficients: (a, b, c) of each step.

    Returns:
        [B, M, C] in the dtype of `x_BMC`; products are of fp16 with fp32 sums.
    """
    return _iterate(x_BMC.contiguous(), coefficients, norm_factor, epsilon)


def _iterate(
    x_BMC: torch.Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    norm_factor: float,
    epsilon: float,
) -> torch.Tensor:
    from megatron_kanana.kernels.normalize_matrices import normalize_matrices
    from megatron_kanana.kernels.symmetric_matmul import matmul, symmetric_matmul

    rows, columns = x_BMC.shape[1:]
    tall = rows > columns
    steps_on_gram = 2 if max(rows, columns) >= WIDE * min(rows, columns) else 1
    phases = [
        coefficients[start : start + steps_on_gram]
        for start in range(0, len(coefficients), steps_on_gram)
    ]
    # Each kernel starts at the end of the batch where the one before it stopped.
    last_first = itertools.cycle((False, True))
    x_BNK = normalize_matrices(x_BMC, SCALE, norm_factor, epsilon, TILE)
    scale = SCALE
    for number, phase in enumerate(phases):
        gram = symmetric_matmul(
            x_BNK, x_BNK, operands_are_symmetric=False, last_first=next(last_first)
        )
        product = functools.partial(symmetric_matmul, operands_are_symmetric=True)
        gram_scale, factor = scale**2, None
        for step, (a, b, c) in enumerate(phase):
            polynomial = product(
                gram,
                gram,
                alpha=c / gram_scale**2,
                addend_BNN=gram,
                beta=b / gram_scale,
                identity=a,
                last_first=next(last_first),
            )
            if step + 1 < len(phase):
                half = product(gram, polynomial, last_first=next(last_first))
                gram = product(polynomial, half, alpha=1 / gram_scale, last_first=next(last_first))
                gram_scale = 1.0
            factor = (
                polynomial
                if factor is None
                else product(polynomial, factor, last_first=next(last_first))
            )
        assert factor is not None
        last = number + 1 == len(phases)
        x_BNK = matmul(
            factor,
            x_BNK,
            alpha=1 / scale,
            out_dtype=x_BMC.dtype if last else torch.float16,
            transpose_out=last and tall,
            last_first=next(last_first),
        )
        scale = 1.0
    return x_BNK[:, :rows, :columns]
