"""Approximate polar factors: U V^T of the singular value decomposition U S V^T, by matrix products.

Both methods iterate X <- a X + b (X X^T) X + c (X X^T)^2 X, an odd polynomial of degree five of the
singular values that leaves the singular vectors alone; they differ in the coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gram_iteration import can_iterate_on_gram, iterate_on_gram

Coefficients = tuple[float, float, float]

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). Large slope at
# zero at the price of singular values that end between 0.68 and 1.13, not at 1.
NEWTON_SCHULZ: Coefficients = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco, Gower, "The Polar Express" (arXiv 2505.16932), table of the authors'
# implementation: the best odd polynomials of degree five, one after another, for singular values
# from 1e-3 to 1, with cushion 0.02407327424182761. The last row is the limit.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
EPSILON = 1e-7  # added to the norm, as both authors do
POLAR_EXPRESS_SAFETY = 1.01  # room for singular values that rounding pushes above the interval


def newton_schulz(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Muon's Newton-Schulz iteration: singular values of `x` go to about 1 (0.68 to 1.13).

    Args:
        x: [..., rows, columns] in any float dtype. Computed in float64 if `x` is, else in 16 bits
            on CUDA and in fp32 elsewhere.
        steps: number of iterations, at least 1.

    Returns:
        a tensor of the shape and dtype of `x`; a zero matrix gives zeros.
    """
    return _iterate(x, [NEWTON_SCHULZ] * steps, norm_factor=1.0)


def polar_express(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Polar Express: singular values of `x` go to 1 as fast as polynomials of degree five can.

    Args:
        x: [..., rows, columns] in any float dtype. Computed in float64 if `x` is, else in 16 bits
            on CUDA and in fp32 elsewhere.
        steps: number of iterations, at least 1; from the eighth on with the limit's coefficients.

    Returns:
        a tensor of the shape and dtype of `x`; a zero matrix gives zeros.
    """
    return _iterate(x, polar_express_coefficients(steps), norm_factor=POLAR_EXPRESS_SAFETY)


ORTHOGONALIZE_METHODS = {"newton_schulz": newton_schulz, "polar_express": polar_express}


def orthogonalize(x: torch.Tensor, method: str, steps: int) -> torch.Tensor:
    """Approximate polar factor of each matrix of `x` [..., rows, columns].

    Args:
        method: 'newton_schulz' or 'polar_express'.
        steps: number of iterations, at least 1.

    Raises:
        ValueError: another method, or fewer than one step.
    """
    if method not in ORTHOGONALIZE_METHODS:
        known = ", ".join(ORTHOGONALIZE_METHODS)
        raise ValueError(f"method is one of {known}; got {method!r}")
    if steps < 1:
        raise ValueError(f"steps is at least 1; got {steps}")
    return ORTHOGONALIZE_METHODS[method](x, steps)


def polar_express_coefficients(steps: int) -> list[Coefficients]:
    """Coefficients of the first `steps` iterations, with the published safety.

    The safety evaluates all polynomials but the last at x / 1.01, so a is divided by 1.01, b by
    1.01^3 and c by 1.01^5.
    """
    s = POLAR_EXPRESS_SAFETY
    safe = [(a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return [*safe[:steps], *[POLAR_EXPRESS[-1]] * (steps - len(safe))]


def _iterate(
    x: torch.Tensor, coefficients: Sequence[Coefficients], norm_factor: float
) -> torch.Tensor:
    matrices = x.reshape(-1, *x.shape[-2:])
    if can_iterate_on_gram(x):
        return iterate_on_gram(matrices, coefficients, norm_factor, EPSILON).reshape(x.shape)
    return iterate_plainly(matrices, coefficients, norm_factor).reshape(x.shape)


def iterate_plainly(
    x_BMC: torch.Tensor, coefficients: Sequence[Coefficients], norm_factor: float
) -> torch.Tensor:
    """The iteration as it is written, on [batch, rows, columns]: the reference of every other form.

    Computed in float64 if `x_BMC` is, else in bf16 on CUDA and in fp32 elsewhere.
    """
    compute_dtype = torch.bfloat16 if x_BMC.is_cuda else torch.float32
    if x_BMC.dtype == torch.float64:
        compute_dtype = torch.float64
    tall = x_BMC.shape[1] > x_BMC.shape[2]
    wide = x_BMC.mT if tall else x_BMC
    norm_dtype = torch.promote_types(wide.dtype, torch.float32)
    norm = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True, dtype=norm_dtype)
    wide = (wide / (norm_factor * norm + EPSILON)).to(compute_dtype)
    for a, b, c in coefficients:
        gram = torch.bmm(wide, wide.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    result = wide.to(x_BMC.dtype)
    return result.mT.contiguous() if tall else result
