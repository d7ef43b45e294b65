"""The expert that every token visits: both backends against float64."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_kanana.kernels.moe import gated_mlp
from megatron_kanana.kernels.native import native_library_error

from .moe_reference import Inputs, float64_results

assert native_library_error() is None

BACKENDS = ["csrc", "torch"]
SIZES = [(100, 64, 96), (1, 5, 3), (0, 8, 8), (77, 33, 20)]


def random_tensors(
    tokens: int, hidden: int, width: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Hidden states, gate and up, down, and the output's gradient."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, hidden), (2 * width, hidden), (hidden, width), (tokens, hidden))
    hidden_states, gate_up, down, grad_out = (
        torch.randn(shape, generator=generator) for shape in shapes
    )
    scaled = (hidden_states, gate_up * hidden**-0.5, down * width**-0.5, grad_out)
    return [tensor.to(dtype) for tensor in scaled]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_those_of_float64(
    backend: str, sizes: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    *leaves, grad_out = random_tensors(*sizes, dtype)
    hidden_states, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    out = gated_mlp(hidden_states, gate_up, down, backend=backend)
    grads = torch.autograd.grad(out, leaves, grad_out)
    tokens = sizes[0]
    expected = float64_results(
        Inputs(
            hidden_states.detach(),
            torch.ones(tokens, 1),
            torch.zeros(tokens, 1, dtype=torch.int32),
            gate_up.detach()[None],
            down.detach()[None],
            grad_out,
        )
    )
    ours = dict(zip(("out", "hidden_states", "gate_up", "down"), (out, *grads), strict=True))
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        reference = expected[name].reshape(tensor.shape)
        error = float((tensor.detach().double() - reference).norm())
        assert error <= tolerance * float(reference.norm()), name


def test_views_and_compiled_calls_give_the_same_bits() -> None:
    *leaves, grad_out = random_tensors(40, 24, 16)
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    views = [leaf.mT.contiguous().mT.requires_grad_() for leaf in leaves]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        return gated_mlp(*leaves, backend="csrc")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = run(*copies)
    grads = torch.autograd.grad(expected, copies, grad_out)
    for function, tensors in ((run, views), (compiled, copies), (compiled, views)):
        out = function(*tensors)
        assert torch.equal(out, expected)
        for grad, other in zip(torch.autograd.grad(out, tensors, grad_out), grads, strict=True):
            assert torch.equal(grad, other)


@pytest.mark.parametrize(
    ("hidden_states", "gate_up", "down", "message"),
    [
        ((3, 4, 1), (6, 4), (4, 3), "hidden_states must have shape [tokens, hidden size]"),
        ((3, 4), (6, 5), (4, 3), "gate_up must have shape [6, 4], got [6, 5]"),
        ((3, 4), (6, 4), (5, 3), "down must have shape [4, 3], got [5, 3]"),
        ((3, 4), (6, 4), (1, 4, 3), "down must have shape [hidden size, width]"),
        ((3, 0), (6, 0), (0, 3), "down must not be empty"),
    ],
)
def test_wrong_shapes_are_refused_by_name(
    hidden_states: tuple[int, ...], gate_up: tuple[int, ...], down: tuple[int, ...], message: str
) -> None:
    tensors = [torch.zeros(shape) for shape in (hidden_states, gate_up, down)]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        gated_mlp(*tensors, backend="csrc")
