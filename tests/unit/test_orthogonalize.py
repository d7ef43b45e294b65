"""Newton-Schulz and Polar Express against their definitions, scalar by scalar, and against SVD."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from megatron_kanana.optimizer.orthogonalize import (
    NEWTON_SCHULZ,
    ORTHOGONALIZE_METHODS,
    POLAR_EXPRESS,
    newton_schulz,
    orthogonalize,
    polar_express,
    polar_express_coefficients,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

LOWER_BOUND = 1e-3  # of the singular values the table is made for
CUSHION = 0.02407327424182761
CONDITIONS = [10.0**exponent for exponent in range(7)]


def powers(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """x, x^3 and x^5 along the last axis."""
    result: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)[..., None] ** np.array(
        [1, 3, 5]
    )
    return result


def best_odd_quintic(low: float, high: float) -> npt.NDArray[np.float64]:
    """(a, b, c) of the odd quintic nearest to 1 on [low, high], by Remez' exchange.

    The error alternates on four points: the ends, and the two extrema of the polynomial.
    """
    if low / high > 1 - 5e-6:  # the system is singular; Taylor's limit is exact to rounding
        return np.array([15 / high, -10 / high**3, 3 / high**5]) / 8
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    signs = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    error, change = math.inf, math.inf
    while change > 1e-15:
        *solution, new_error = np.linalg.solve(np.hstack([powers(points), signs]), np.ones(4))
        a, b, c = solution
        root = math.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
        error, change = new_error, abs(new_error - error)
    return np.array(solution)


def minimax_table(rows: int) -> list[npt.NDArray[np.float64]]:
    """Polar Express (arXiv 2505.16932): each step's best polynomial on the last one's image.

    With a cushion the polynomial is fitted to an interval that starts no lower than cushion * high,
    then rescaled so that the image of the whole interval is centred on 1.
    """
    low, high, table = LOWER_BOUND, 1.0, []
    for _ in range(rows):
        row = best_odd_quintic(max(low, CUSHION * high), high)
        row *= 2 / (powers(low) @ row + powers(high) @ row)
        low = float(powers(low) @ row)
        high = 2 - low
        table.append(row)
    return table


def test_the_table_solves_the_minimax_recursion() -> None:
    """Rows 1 to 6 to rounding; 7 and 8, fitted to all but a point, to what that allows."""
    table = minimax_table(len(POLAR_EXPRESS))
    np.testing.assert_allclose(POLAR_EXPRESS[:6], table[:6], rtol=1e-14)
    np.testing.assert_allclose(POLAR_EXPRESS[6:], table[6:], rtol=1e-8)


def test_safety_evaluates_all_rows_but_the_last_at_a_smaller_value() -> None:
    """p(x / 1.01) for rows 1 to 7; row 8 as it is, and repeated."""
    coefficients = polar_express_coefficients(10)
    values = np.linspace(0, 1, 11)
    for given, row in zip(coefficients[:7], POLAR_EXPRESS, strict=False):
        np.testing.assert_allclose(powers(values) @ given, powers(values / 1.01) @ row, atol=1e-14)
    assert coefficients[7:] == [(1.875, -1.25, 0.375)] * 3
    assert polar_express_coefficients(3) == coefficients[:3]


def known_matrix(values: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """Random U, V^T with orthonormal columns and rows, and U diag(values) V^T, in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return left, right.mT, (left * values) @ right.mT


def iterate_scalars(
    values: torch.Tensor, coefficients: Sequence[tuple[float, float, float]], norm_factor: float
) -> torch.Tensor:
    """What the iteration does to singular values."""
    values = values / (norm_factor * values.norm() + 1e-7)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def method_coefficients(method: str, steps: int) -> tuple[list[tuple[float, float, float]], float]:
    """Coefficients and factor on the norm."""
    if method == "newton_schulz":
        return [NEWTON_SCHULZ] * steps, 1.0
    return polar_express_coefficients(steps), 1.01


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("method", list(ORTHOGONALIZE_METHODS))
def test_singular_values_follow_the_polynomials_and_vectors_stay(
    method: str, condition: float
) -> None:
    """U p(S) V^T, and the orthogonality error |U U^T - I| that p(S) implies, wide and tall."""
    values = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    for rows, columns in ((24, 40), (40, 24)):
        left, right, x = known_matrix(values, rows, columns)
        for steps in (1, 5, 9):
            exact = iterate_scalars(values, *method_coefficients(method, steps))
            result = orthogonalize(x, method, steps)
            torch.testing.assert_close(result, (left * exact) @ right, rtol=0, atol=1e-10)
            wide = result if rows < columns else result.mT
            error = torch.linalg.matrix_norm(wide @ wide.mT - torch.eye(24).double(), ord=2)
            assert abs(error - (exact**2 - 1).abs().max()) < 1e-9


@pytest.mark.parametrize("condition", CONDITIONS)
def test_polar_express_is_closer_to_the_polar_factor_than_newton_schulz(condition: float) -> None:
    """At five steps, for every condition number; and it converges where its table starts."""
    values = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    _, _, x = known_matrix(values, 24, 40)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    polar = left @ right

    def distance(value: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(value - polar) / math.sqrt(24))

    assert distance(polar_express(x, 5)) < distance(newton_schulz(x, 5))
    if condition <= 100:
        assert distance(polar_express(x, 8)) < 1e-9
        assert distance(newton_schulz(x, 8)) > 0.1


@pytest.mark.parametrize("method", list(ORTHOGONALIZE_METHODS))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_other_dtypes_are_computed_in_fp32_and_come_back(
    dtype: torch.dtype, tolerance: float, method: str
) -> None:
    """The result of a rounded matrix, rounded."""
    x = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = orthogonalize(x, method, 5)
    assert result.dtype == dtype
    exact = orthogonalize(x.double(), method, 5)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", list(ORTHOGONALIZE_METHODS))
def test_leading_dimensions_are_a_batch(method: str) -> None:
    """Every matrix alone gives the same; transposing commutes; nothing is changed in place."""
    x = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = x.clone()
    result = orthogonalize(x, method, 5)
    assert torch.equal(x, before)
    assert result.is_contiguous()
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(result[i, j], orthogonalize(x[i, j], method, 5))
    torch.testing.assert_close(result.mT, orthogonalize(x.mT, method, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", list(ORTHOGONALIZE_METHODS))
def test_zero_and_tiny_matrices_stay_finite(method: str, dtype: torch.dtype) -> None:
    """A zero matrix of a batch gives zeros; an empty batch an empty one."""
    x = torch.stack([torch.zeros(4, 6), torch.full((4, 6), 1e-30), torch.eye(4, 6)]).to(dtype)
    result = orthogonalize(x, method, 5)
    assert not result[0].any()
    assert torch.isfinite(result).all()
    assert orthogonalize(x[:0], method, 5).shape == (0, 4, 6)


def test_unknown_methods_and_no_steps_are_refused() -> None:
    """With the value in the message."""
    x = torch.eye(2)
    with pytest.raises(ValueError, match="newton_schulz, polar_express; got 'svd'"):
        orthogonalize(x, "svd", 5)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        orthogonalize(x, "polar_express", 0)
