"""The output layer in fp8 on a CPU: chunks, pieces, scales and sums, on stand-ins.

Transformer Engine, and the kernel for gradients, need a Hopper GPU; here plain torch does what they
do. test_linear_cross_entropy_sm90.py has the real ones.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_kanana.kernels.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy, plain
from megatron_kanana.kernels.linear_cross_entropy.fp8_products import Fp8Products
from megatron_kanana.kernels.linear_cross_entropy.vocabulary import Vocabulary
from megatron_kanana.kernels.native import load_native_operations
from megatron_kanana.planning import activations

from .fp8_loss_reference import assert_close, in_fp8, random_problem

FORMATS = {dtype: dtype for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}


class Storage:
    """Numbers of 8 bits in one order or both, as `Float8TensorStorage`."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def get_metadata(self) -> dict[str, Any]:
        return self.fields

    def values(self, name: str) -> torch.Tensor:
        """Of 'data' or 'data_transpose', in float64."""
        numbers = self.fields[name].view(self.fields["fp8_dtype"]).double()
        values: torch.Tensor = numbers * self.fields["fp8_scale_inv"].double()
        return values


class Quantizer:
    """As `Float8CurrentScalingQuantizer`."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype

    def __call__(self, values: torch.Tensor) -> Storage:
        scale = 448 / values.float().abs().max()
        data = (values.float() * scale).to(self.dtype).view(torch.uint8)
        return Storage(
            data=data,
            data_transpose=data.t().contiguous(),
            fp8_scale_inv=1 / scale,
            fp8_dtype=self.dtype,
        )


def general_gemm(
    a: Storage,
    b: Storage,
    *,
    out_dtype: torch.dtype,
    layout: str,
    out: torch.Tensor,
    accumulate: bool,
    use_split_accumulator: bool,
) -> None:
    """Reads the order that Hopper's tensor cores do, in which sums run along rows."""
    assert out.is_contiguous() and out.dtype == out_dtype
    assert use_split_accumulator == (layout != "TN")
    left = b.values("data_transpose" if layout[1] == "T" else "data")
    right = a.values("data" if layout[0] == "T" else "data_transpose")
    out.copy_(left @ right.T + (out.double() if accumulate else 0))


def gradient_in_both_orders(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_word: int,
    statistics: torch.Tensor,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    transposed: torch.Tensor,
) -> None:
    """As the operation `cross_entropy_gradient_fp8`."""
    values = logits.float()
    plain.gradient_(values, labels, first_word, statistics, weights)
    gradient.copy_(values.to(torch.float8_e5m2))
    transposed.copy_(gradient.t())


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of Transformer Engine and of the kernel."""
    load_native_operations()
    name = "transformer_engine"
    modules: dict[str, dict[str, Any]] = {
        name: {},
        f"{name}.pytorch": {"Float8CurrentScalingQuantizer": Quantizer},
        f"{name}.pytorch.constants": {"TE_DType": FORMATS},
        f"{name}.pytorch.tensor": {"Float8TensorStorage": Storage},
        f"{name}.pytorch.cpp_extensions": {"general_gemm": general_gemm},
    }
    for module, contents in modules.items():
        made = types.ModuleType(module)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, module, made)
    library = torch.library.Library("megatron_kanana", "IMPL")
    library.impl("cross_entropy_gradient_fp8", gradient_in_both_orders, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("known", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("tokens", [16, 144, 1552])
def test_losses_and_gradients_are_those_of_float64_with_the_same_roundings(
    tokens: int, known: bool, stand_ins: None
) -> None:
    """One chunk with fewer tokens than a piece, one with two pieces, four with up to four."""
    problem = random_problem(tokens, 32, 208)
    assert_close(in_fp8(problem, "torch", known=known), problem, losses=1e-5, gradients=5e-3)


def test_losses_that_do_not_count_and_no_losses_at_all_add_nothing(stand_ins: None) -> None:
    for tokens in (0, 64):
        problem, weights = random_problem(tokens, 32, 48), torch.zeros(tokens)
        inputs, weight = problem.hidden_states.requires_grad_(), problem.weight.requires_grad_()
        losses = linear_cross_entropy(
            inputs, weight, problem.labels, weights, backend="torch", fp8=True
        )
        (losses * weights).sum().backward()
        for gradient in (inputs.grad, weight.grad):
            assert gradient is not None and not gradient.any()


def test_the_planner_knows_its_chunks(stand_ins: None) -> None:
    problem = random_problem(32, 32, 48)
    vocabulary = Vocabulary(plain, None, False, CHUNK_BYTES)
    products = Fp8Products(vocabulary, problem.hidden_states, problem.weight)
    assert products.bytes_per_token == 48 * activations.FP8_LOGIT_BYTES
    assert products.token_multiple == activations.FP8_CHUNK_MULTIPLE
    assert activations.CHUNK_BYTES == CHUNK_BYTES


def test_without_gradients_losses_are_those_in_bf16(stand_ins: None) -> None:
    problem = random_problem(64, 32, 48)
    in_fp8, in_bf16 = (
        linear_cross_entropy(
            problem.hidden_states, problem.weight, problem.labels, backend="torch", fp8=fp8
        )
        for fp8 in (True, False)
    )
    assert torch.equal(in_fp8, in_bf16)


@pytest.mark.parametrize(
    "tokens, words, dtype, message",
    [
        (24, 48, torch.bfloat16, r"hidden states must be bfloat16 in multiples of 16, got .*\(24,"),
        (32, 40, torch.bfloat16, r"weight must be bfloat16 in multiples of 16, got .*\(40, 32\)"),
        (32, 48, torch.float32, r"hidden states must be bfloat16 .* got torch.float32"),
    ],
)
def test_what_fp8_cannot_take_is_refused(
    tokens: int, words: int, dtype: torch.dtype, message: str, stand_ins: None
) -> None:
    problem = random_problem(tokens, 32, words)
    inputs = problem.hidden_states.to(dtype).requires_grad_()
    with pytest.raises(RuntimeError, match=f"precision.output_layer = fp8: {message}"):
        linear_cross_entropy(
            inputs, problem.weight.to(dtype), problem.labels, backend="torch", fp8=True
        )


def test_a_cpu_has_no_output_layer_in_fp8() -> None:
    problem = random_problem(32, 32, 48)
    inputs = problem.hidden_states.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no losses in fp8 for cpu; set precision.output_layer"):
        linear_cross_entropy(inputs, problem.weight, problem.labels, backend="torch", fp8=True)
