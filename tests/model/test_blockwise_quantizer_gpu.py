"""Transformer Engine's quantiser in blocks of 1 x 128, on csrc's kernel, beside its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_kanana.kernels.fp8_blockwise import (
    blockwise_error,
    quantize_by_csrc,
    quantizing_by_csrc,
)
from tests.kernels.test_fp8_quantize_blocks_sm90 import USAGES, random_values

pytestmark = pytest.mark.gpu

SHAPES = [(256, 384), (128, 3, 256), (4096, 2048)]
TENSORS = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    assert blockwise_error() is None


def quantizer(
    *, rowwise: bool = True, columnwise: bool = True, internal: bool = True, **options: Any
) -> Any:
    """Transformer Engine's for inputs and gradients; `form` is 'e4m3' or 'e5m2'."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
        Float8BlockQuantizer,
        TE_DType,
    )

    forms = {"e4m3": TE_DType.kFloat8E4M3, "e5m2": TE_DType.kFloat8E5M2}
    form = forms[options.pop("form", "e4m3")]
    options = {"block_scaling_dim": 1, **options}
    found = Float8BlockQuantizer(form, rowwise=rowwise, columnwise=columnwise, **options)
    found.internal = internal
    return found


def own(made: Any, values: torch.Tensor) -> Any:
    """Through csrc's kernel, and nothing else."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("not by csrc's kernel")

    made.quantize_impl = refuse
    return quantizing_by_csrc(made)(values)


def theirs(made: Any, values: torch.Tensor) -> Any:
    """By Transformer Engine's kernel."""
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor

    return float8_blockwise_tensor.tex.quantize(values, made)


def same(ours: torch.Tensor | None, others: torch.Tensor | None) -> bool:
    """Both are missing, or have the same bits."""
    if ours is None or others is None:
        return ours is others
    return ours.shape == others.shape and ours.dtype == others.dtype and torch.equal(ours, others)


def check(made: Any, values: torch.Tensor) -> None:
    """All that the two make is the same."""
    ours, others = own(made, values), theirs(made, values)
    assert type(ours) is type(others)
    for name in TENSORS:
        assert same(getattr(ours, name), getattr(others, name)), name
    for name in ("_is_2D_scaled", "_data_format", "_fp8_dtype"):
        assert getattr(ours, name) == getattr(others, name), name
    assert type(ours._quantizer) is type(others._quantizer)
    if not made.internal:
        assert (ours.shape, ours.dtype) == (others.shape, others.dtype)
        assert ours.requires_grad == others.requires_grad


@pytest.mark.parametrize(("rowwise", "columnwise"), USAGES)
@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_transformer_engine(
    shape: tuple[int, ...], internal: bool, rowwise: bool, columnwise: bool
) -> None:
    made = quantizer(rowwise=rowwise, columnwise=columnwise, internal=internal)
    check(made, random_values(*shape))


def with_lines_of(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Whole blocks along rows and along columns, and a number alone."""

    def change(values: torch.Tensor) -> torch.Tensor:
        values[5], values[:, 9], values[200, 300] = value, value, value
        return values

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(with_lines_of(value) for value in (0.0, -0.0, 3e4, -1e9, 3e38, 1e-38, -1e-40)),
        with_lines_of(float("inf")),
        lambda values: values * 1e-36,
        torch.zeros_like,
    ],
)
def test_bits_are_the_same_at_the_ends_of_the_range(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    check(quantizer(), change(random_values(256, 384)))


def test_every_magnitude_has_the_same_scale() -> None:
    magnitudes = torch.arange(0x7F80, device="cuda", dtype=torch.int16).view(torch.bfloat16)
    values = torch.zeros(len(magnitudes), 128, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(len(magnitudes), device="cuda")
    values[rows, rows % 128] = magnitudes
    check(quantizer(), values)


def as_they_are(values: torch.Tensor) -> torch.Tensor:
    """No change."""
    return values


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"block_scaling_dim": 2}, as_they_are),
        ({"form": "e5m2"}, as_they_are),
        ({"force_pow_2_scales": False}, as_they_are),
        ({"amax_epsilon": 1e-3}, as_they_are),
        ({"all_gather_usage": True}, as_they_are),
        ({}, lambda values: values.float()),
        ({}, lambda values: values[:64]),
        ({}, lambda values: values[:, ::2]),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_transformer_engine(
    options: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    made = quantizer(**options)
    made.quantize_impl = lambda _: "theirs"
    assert quantizing_by_csrc(made)(change(random_values(128, 256))) == "theirs"


def test_a_layer_has_the_same_bits() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    values = torch.randn(128, 4, 384, device="cuda", dtype=torch.bfloat16)
    grad_out = torch.randn(128, 4, 256, device="cuda", dtype=torch.bfloat16)

    def results(*, by_csrc: bool) -> tuple[list[torch.Tensor], list[Any]]:
        """Output and gradients, and the quantisers."""
        torch.manual_seed(1)
        layer = te.Linear(384, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
        if by_csrc:
            quantize_by_csrc(layer)
        inputs = values.clone().requires_grad_()
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
            out = layer(inputs)
        out.backward(grad_out)
        assert inputs.grad is not None and layer.weight.grad is not None
        quantizers = [made for each in layer.quantizers.values() for made in each]
        return [out.detach(), inputs.grad, layer.weight.grad], quantizers

    ours, replaced = results(by_csrc=True)
    others, kept = results(by_csrc=False)
    assert all("quantize_impl" in vars(made) for made in replaced)
    assert not any("quantize_impl" in vars(made) for made in kept)
    assert all(map(torch.equal, ours, others))
