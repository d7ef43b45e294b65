"""csrc's quantisation in blocks of 128 on a Hopper GPU against torch's casts, bit by bit:

python -m pytest --noconftest tests/kernels/test_fp8_quantize_blocks_sm90.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_kanana.kernels.fp8_blockwise import quantize_blocks
from megatron_kanana.kernels.native import load_native_operations

from .test_moe_sm90 import no_synchronisation

pytestmark = pytest.mark.gpu

USAGES = [(True, True), (True, False), (False, True)]
SHAPES = [
    *((128, 128), (256, 128), (128, 384), (384, 256)),
    *((1152, 2176), (4096, 2048), (8192, 6144)),
]
BLOCK = 128
LIMIT = torch.finfo(torch.float8_e4m3fn).max
LARGEST_POWER = 2.0**127


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_native_operations()


def of_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of a matrix in blocks along its rows, and what they are multiplied by, transposed."""
    blocks = values.float().unflatten(1, (-1, BLOCK))
    largest = blocks.nan_to_num(0.0, float("inf"), -float("inf")).abs().amax(2, keepdim=True)
    # The quotient in float64, whose range has room for all, without its mantissa.
    scale = ((LIMIT / largest.double()).view(torch.int64) >> 52 << 52).view(torch.float64)
    scale = scale.clamp(max=LARGEST_POWER)
    scale = torch.where((largest > 0) & largest.isfinite(), scale, 1.0)
    scaled = (blocks * scale.float()).clamp(-LIMIT, LIMIT).flatten(1)
    inverse = (1.0 / scale).float().squeeze(2).T
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), inverse


def random_values(*shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(*shape, device="cuda", generator=generator)
    sizes = torch.randn(*shape, device="cuda", generator=generator)
    return (values * (2 * sizes).exp()).bfloat16()


def check(values: torch.Tensor, *, rowwise: bool = True, columnwise: bool = True) -> None:
    """What is asked for has the bits of torch, and the rest is empty."""
    data, scale_inv, transposed, transposed_scale_inv = quantize_blocks(
        values, rowwise=rowwise, columnwise=columnwise
    )
    matrix = values.flatten(0, -2)
    if rowwise:
        assert data.shape == values.shape
        check_lines(matrix, data.flatten(0, -2), scale_inv)
    else:
        assert data.numel() == scale_inv.numel() == 0
    if columnwise:
        assert transposed.shape == (values.shape[-1], *values.shape[:-1])
        check_lines(matrix.T, transposed.flatten(1), transposed_scale_inv)
    else:
        assert transposed.numel() == transposed_scale_inv.numel() == 0


def check_lines(lines: torch.Tensor, data: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """Bits are those of torch."""
    numbers, inverse = of_rows(lines)
    assert torch.equal(scale_inv, inverse)
    assert torch.equal(data, numbers)


@pytest.mark.parametrize(("rowwise", "columnwise"), USAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_torch(
    shape: tuple[int, int], rowwise: bool, columnwise: bool
) -> None:
    check(random_values(*shape), rowwise=rowwise, columnwise=columnwise)


def test_leading_dimensions_stay() -> None:
    check(random_values(64, 4, 384))


def test_a_view_may_begin_at_any_multiple_of_16_bytes() -> None:
    numbers = random_values(8 + 128 * 384)
    check(numbers[8:].view(128, 384))


@pytest.mark.parametrize("at", [(0, 0), (255, 639), (100, 317)])
@pytest.mark.parametrize("outlier", [3e4, -1e9, 3e38])
def test_an_outlier_sets_the_scales_of_its_two_blocks(outlier: float, at: tuple[int, int]) -> None:
    values = random_values(256, 640)
    values[at] = outlier
    check(values)


def test_every_magnitude_has_its_scale() -> None:
    """All of bf16's but infinities and NaN, each as the largest of a row and of a column."""
    magnitudes = torch.arange(0x7F80, device="cuda", dtype=torch.int16).view(torch.bfloat16)
    values = torch.zeros(len(magnitudes), BLOCK, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(len(magnitudes), device="cuda")
    values[rows, rows % BLOCK] = magnitudes * (1 - 2 * (rows // 3 % 2)).bfloat16()
    check(values)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 1e-40, -3e38])
def test_numbers_at_the_ends_of_the_range(value: float) -> None:
    check(torch.full((128, 256), value, device="cuda", dtype=torch.bfloat16))


def test_numbers_far_below_the_largest_become_zeros_with_their_sign() -> None:
    values = random_values(128, 128) * 1e-36
    values[::7, ::5] = 3e38
    values[:, 1] = -1e-40
    check(values)


def test_blocks_with_an_infinity_have_a_scale_of_one() -> None:
    values = random_values(128, 256)
    values[3, 4], values[5, 6] = float("inf"), -float("inf")
    check(values)


def test_a_nan_stays_alone() -> None:
    values = random_values(128, 256)
    values[7, 8] = float("nan")
    data, scale_inv, transposed, transposed_scale_inv = quantize_blocks(values)
    for found in (data, transposed.T):
        nans = found.view(torch.float8_e4m3fn).float().isnan()
        assert nans.nonzero().tolist() == [[7, 8]]
    values[7, 8] = 0.0
    others = quantize_blocks(values)
    assert torch.equal(scale_inv, others[1])
    assert torch.equal(transposed_scale_inv, others[3])


def test_every_run_has_the_same_bits() -> None:
    values = random_values(4096, 4096)
    first = quantize_blocks(values)
    for _ in range(5):
        for found, same in zip(quantize_blocks(values), first, strict=True):
            assert torch.equal(found, same)


def test_nothing_waits_for_the_gpu() -> None:
    values = random_values(256, 256)
    quantize_blocks(values)
    with no_synchronisation():
        quantize_blocks(values)
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.float(), "values must be bfloat16, got Float"),
        (lambda values: values.T, "values must be contiguous"),
        (lambda values: values[0], r"values must have shape \[..., columns\]"),
        (lambda values: values[:0], "values must not be empty"),
        (lambda values: values[:64], "multiples of 128, got 64 and 384"),
        (lambda values: values[:, :192].contiguous(), "multiples of 128, got 256 and 192"),
        (lambda values: values.flatten()[1 : 1 + 128 * 128].view(128, 128), "multiple of 16 bytes"),
    ],
)
def test_other_values_are_refused(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        quantize_blocks(change(random_values(256, 384)))
