"""Products of symmetric matrices on a Hopper GPU, and the iterations made of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from megatron_kanana.optimizer.gram_iteration import can_iterate_on_gram, gram_iteration_error
from megatron_kanana.optimizer.orthogonalize import (
    NEWTON_SCHULZ,
    POLAR_EXPRESS_SAFETY,
    iterate_plainly,
    newton_schulz,
    polar_express,
    polar_express_coefficients,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.gpu
TILE = 128
# batch, symmetric size, other size: a single tile; several rounds of the persistent programs
SHAPES = [(1, 128, 128), (3, 384, 640), (40, 768, 256), (1, 2048, 1024)]


@pytest.fixture(autouse=True)
def hopper() -> None:
    """Skip where the kernels cannot run at all; where they should, a failure is a failure."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    assert gram_iteration_error(torch.device("cuda", torch.cuda.current_device())) is None


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp16 with rows of norm 1, so that products are of size 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)
    return (values / math.sqrt(shape[-1])).half()


def upper_tiles(size: int) -> torch.Tensor:
    """Mask of the tiles above the diagonal, which symmetric matrices do not store."""
    tile = torch.arange(size, device="cuda") // TILE
    return tile[:, None] < tile[None, :]


def symmetric(batch: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric fp16 matrix as it is stored, with NaN in the tiles that are not, and whole."""
    values = random(batch, size, size, seed=seed)
    whole = torch.tril(values) + torch.tril(values, -1).mT
    return whole.masked_fill(upper_tiles(size), math.nan), whole


def poison(*shape: int, dtype: torch.dtype = torch.float16) -> None:
    """Leave NaN in the memory that the next tensor of this shape will get."""
    torch.full(shape, math.nan, device="cuda", dtype=dtype)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(("batch", "size", "depth"), SHAPES)
def test_a_gram_matrix_equals_float64(batch: int, size: int, depth: int, last_first: bool) -> None:
    """X X^T to fp16's rounding, diagonal tiles exactly symmetric, the same every time."""
    from megatron_kanana.kernels.symmetric_matmul import symmetric_matmul

    x = random(batch, size, depth)
    poison(batch, size, size)
    result = symmetric_matmul(x, x, operands_are_symmetric=False, last_first=last_first)
    stored = ~upper_tiles(size)
    exact = torch.matmul(x.double(), x.double().mT)
    assert relative_error(result[:, stored], exact[:, stored]) < 1e-3
    for start in range(0, size, TILE):
        block = result[:, start : start + TILE, start : start + TILE]
        assert torch.equal(block, block.mT)
    again = symmetric_matmul(x, x, operands_are_symmetric=False)
    assert torch.equal(result[:, stored], again[:, stored])


@pytest.mark.parametrize(("batch", "size", "depth"), SHAPES)
def test_a_product_of_commuting_matrices_equals_float64(batch: int, size: int, depth: int) -> None:
    """alpha A B + beta C + identity I of stored halves, nothing read above the diagonal tiles."""
    from megatron_kanana.kernels.symmetric_matmul import symmetric_matmul

    (a, whole_a), (b, whole_b) = symmetric(batch, size, 1), symmetric(batch, size, 2)
    poison(batch, size, size)
    result = symmetric_matmul(
        a, b, operands_are_symmetric=True, alpha=0.5, addend_BNN=b, beta=-2.0, identity=3.0
    )
    exact = 0.5 * torch.matmul(whole_a.double(), whole_b.double()) - 2.0 * whole_b.double()
    exact += 3.0 * torch.eye(size, device="cuda", dtype=torch.float64)
    stored = ~upper_tiles(size)
    assert relative_error(result[:, stored], exact[:, stored]) < 1e-3


@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize(("batch", "size", "columns"), SHAPES)
def test_a_product_with_a_symmetric_matrix_equals_float64(
    batch: int, size: int, columns: int, dtype: torch.dtype, tolerance: float, transpose_out: bool
) -> None:
    """alpha A B in every dtype and both orientations."""
    from megatron_kanana.kernels.symmetric_matmul import matmul

    a, whole_a = symmetric(batch, size, 1)
    b = random(batch, size, columns, seed=2)
    poison(batch, size, columns, dtype=dtype)
    result = matmul(a, b, alpha=0.5, out_dtype=dtype, transpose_out=transpose_out)
    assert result.dtype == dtype
    exact = 0.5 * torch.matmul(whole_a.double(), b.double())
    assert relative_error(result.mT if transpose_out else result, exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 100, 300), (3, 300, 100), (2, 256, 256)])
def test_normalized_matrices_are_wide_padded_and_of_the_norm_asked_for(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Values to fp16's rounding; zeros beyond the matrix."""
    from megatron_kanana.kernels.normalize_matrices import normalize_matrices

    x = torch.randn(shape, device="cuda").to(dtype)
    result = normalize_matrices(x, norm=32.0, norm_factor=1.5, epsilon=1e-7, multiple=128)
    wide = x.mT if shape[1] > shape[2] else x
    exact = 32.0 * wide.double() / (1.5 * wide.double().norm(dim=(1, 2), keepdim=True) + 1e-7)
    assert all(length % 128 == 0 for length in result.shape[1:])
    rows, columns = wide.shape[1:]
    assert relative_error(result[:, :rows, :columns], exact) < 1e-3
    assert not result[:, rows:].any()
    assert not result[:, :, columns:].any()


def spectrum(name: str, size: int) -> torch.Tensor:
    """Singular values."""
    outlier = torch.full((size,), 0.03)
    outlier[0] = 1.0
    half = torch.ones(size)
    half[size // 2 :] = 1e-3
    return {
        "1 to 1e-3": torch.logspace(0, -3, size),
        "1 to 1e-4": torch.logspace(0, -4, size),
        "half 1, half 1e-3": half,
        "one outlier": outlier,
    }[name].double()


def matrices(name: str, rows: int, columns: int) -> torch.Tensor:
    """Two random fp32 matrices of a kind."""
    generator = torch.Generator("cuda").manual_seed(1)
    size = min(rows, columns)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator, device="cuda", dtype=torch.float64)

    if name == "gaussian":
        return gaussian(rows, columns).float()
    if name == "low rank and noise":
        rank = size // 16
        product = torch.matmul(gaussian(rows, rank), gaussian(rank, columns)) / math.sqrt(rank)
        return (product + 1e-2 * gaussian(rows, columns)).float()
    left = torch.linalg.qr(gaussian(rows, size)).Q
    right = torch.linalg.qr(gaussian(columns, size)).Q
    return torch.matmul(left * spectrum(name, size).cuda(), right.mT).float()


@pytest.mark.parametrize("shape", [(384, 1024), (1024, 384), (512, 512)])
@pytest.mark.parametrize(
    "name",
    [
        "gaussian",
        "low rank and noise",
        "1 to 1e-3",
        "1 to 1e-4",
        "half 1, half 1e-3",
        "one outlier",
    ],
)
def test_the_fast_form_is_closer_to_the_iteration_than_plain_bf16(
    name: str, shape: tuple[int, int]
) -> None:
    """Closer to float64's iteration and to the polar factor, with no larger singular value."""
    x = matrices(name, *shape)
    exact = polar_express(x.double(), 5)
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    polar = torch.matmul(left, right)
    assert can_iterate_on_gram(x)
    fast = polar_express(x, 5)
    assert fast.dtype == torch.float32
    plain = iterate_plainly(x, polar_express_coefficients(5), POLAR_EXPRESS_SAFETY)

    def distance(value: torch.Tensor, target: torch.Tensor) -> float:
        return float((value.double() - target).norm() / target.norm())

    assert distance(fast, exact) < distance(plain, exact)
    # Plain bf16 is nearer to the polar factor where its errors happen to point there.
    assert distance(fast, polar) < distance(exact, polar) + 1e-3
    largest = [torch.linalg.svdvals(value.double()).max().item() for value in (fast, plain)]
    assert largest[0] < max(largest[1], 1.125) + 5e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("method", [polar_express, newton_schulz])
def test_the_fast_form_is_as_good_as_plain_bf16_for_any_number_of_steps(
    method: Callable[[torch.Tensor, int], torch.Tensor], steps: int
) -> None:
    """Sizes that are no multiple of a tile, wide and tall, bf16 in and out."""
    coefficients, norm_factor = [NEWTON_SCHULZ] * steps, 1.0
    if method is polar_express:
        coefficients, norm_factor = polar_express_coefficients(steps), POLAR_EXPRESS_SAFETY
    for shape in ((300, 1000), (1000, 300), (320, 336)):
        x = torch.randn(2, *shape, device="cuda").bfloat16()
        result = method(x, steps)
        assert result.shape == x.shape
        assert result.dtype == torch.bfloat16
        exact = method(x.double(), steps)
        plain = iterate_plainly(x, coefficients, norm_factor)
        errors = [(value.double() - exact).norm() / exact.norm() for value in (result, plain)]
        assert errors[0] < errors[1] + 1e-3


def test_zero_matrices_give_zeros_and_the_batch_does_not_matter() -> None:
    """A matrix gives the same bits alone and among others."""
    x = torch.randn(5, 256, 512, device="cuda")
    x[2] = 0
    result = polar_express(x, 5)
    assert not result[2].any()
    assert torch.isfinite(result).all()
    assert torch.equal(result[3], polar_express(x[3], 5))
