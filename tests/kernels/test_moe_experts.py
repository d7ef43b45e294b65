"""The experts' output and gradients: both backends against float64, under every kind of load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_kanana.kernels.moe import Permutation, permutation_of, routed_experts
from megatron_kanana.kernels.native import native_library_error

from .moe_reference import LOADS, Inputs, Sizes, float64_results, random_inputs

assert native_library_error() is None

BACKENDS = ["csrc", "torch"]
# Sizes in use, and some that fit no vector and no block.
SIZES = [Sizes(150, 4, 16, 64, 32), Sizes(70, 3, 8, 33, 21), Sizes(40, 2, 6, 5, 1)]
LEAVES = ("hidden_states", "weights", "gate_up", "down")


def permutation(inputs: Inputs, backend: str) -> Permutation:
    return permutation_of(inputs.chosen, len(inputs.down), inputs.rows, backend=backend)


def leaves_of(inputs: Inputs) -> list[torch.Tensor]:
    return [vars(inputs)[name].clone().requires_grad_() for name in LEAVES]


def apply(leaves: list[torch.Tensor], order: Permutation, backend: str) -> torch.Tensor:
    hidden_states, weights, gate_up, down = leaves
    return routed_experts(hidden_states, weights, order, gate_up, down, backend=backend)


def results(inputs: Inputs, backend: str) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    leaves = leaves_of(inputs)
    out = apply(leaves, permutation(inputs, backend), backend)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    return {"out": out.detach(), **dict(zip(LEAVES, grads, strict=True))}


def check_results(inputs: Inputs, backend: str, tolerance: float) -> None:
    """Errors relative to the size of each tensor; `tolerance` for root mean squares."""
    ours, expected = results(inputs, backend), float64_results(inputs)
    for name, tensor in expected.items():
        assert ours[name].shape == tensor.shape, name
        assert ours[name].dtype == getattr(inputs, name, inputs.hidden_states).dtype, name
        error = float((ours[name].double() - tensor).norm())
        assert error <= tolerance * float(tensor.norm()), (name, error, float(tensor.norm()))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_those_of_float64(backend: str, sizes: Sizes, load: str) -> None:
    check_results(random_inputs(sizes, load, seed=sizes.tokens), backend, 1e-6)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_loses_no_more_than_its_rounding(backend: str, load: str) -> None:
    inputs = random_inputs(SIZES[0], load, seed=1, dtype=torch.bfloat16)
    check_results(inputs, backend, 2**-8 if backend == "csrc" else 2**-7)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("load", ["uniform", "one expert", "elsewhere"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_and_none(backend: str, load: str, tokens: int) -> None:
    check_results(random_inputs(Sizes(tokens, 3, 6, 16, 8), load), backend, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_may_visit_an_expert_here(backend: str) -> None:
    inputs = random_inputs(SIZES[1])
    inputs.chosen.fill_(-1)
    ours = results(inputs, backend)
    assert all(tensor.eq(0).all() for tensor in ours.values())


def test_layers_that_are_computed_in_several_waves_give_the_same() -> None:
    # Twelve experts of 1.6 million numbers, of which a wave takes ten.
    check_results(random_inputs(Sizes(20, 2, 12, 1024, 512), seed=2), "csrc", 2e-6)
    # One expert whose rows alone fill more than a wave.
    # In fp32, a sum over so many rows has a few more roundings.
    check_results(random_inputs(Sizes(15000, 1, 1, 500, 3), "one expert", seed=3), "csrc", 4e-6)


def test_every_number_of_threads_and_every_run_gives_the_same_bits() -> None:
    inputs = random_inputs(SIZES[0], "Zipf", seed=4)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(results(inputs, "csrc"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


def test_views_give_the_same_bits_as_copies() -> None:
    inputs = random_inputs(SIZES[1], seed=5)
    order = permutation(inputs, "csrc")
    copies, views = leaves_of(inputs), leaves_of(inputs)
    strided = [leaf.mT.contiguous().mT for leaf in views]
    assert not any(leaf.is_contiguous() for leaf in strided)
    grad_out = inputs.grad_out[:1].expand_as(inputs.grad_out)
    expected = apply(copies, order, "csrc")
    out = apply(strided, order, "csrc")
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, views, grad_out)
    for grad, other in zip(
        grads, torch.autograd.grad(expected, copies, grad_out.contiguous()), strict=True
    ):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_waits_for_the_backward_pass_is_the_input_and_the_pre_activations(
    dtype: torch.dtype,
) -> None:
    sizes = SIZES[0]
    inputs = random_inputs(sizes, seed=6, dtype=dtype)
    leaves, order = leaves_of(inputs), permutation(inputs, "csrc")
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        out = apply(leaves, order, "csrc")
    parameters = {leaf.data_ptr() for leaf in leaves[2:]}
    assert parameters <= kept.keys() and out.data_ptr() not in kept
    of_tokens = sum(t.nbytes for place, t in kept.items() if place not in parameters)
    a_token = sizes.hidden + 2 * sizes.slots * sizes.width
    routing = (4 + 4 + 4) * sizes.slots  # weights, slot_of_row and row_of_slot
    offsets = 4 * (sizes.experts + 1)
    assert of_tokens == sizes.tokens * (dtype.itemsize * a_token + routing) + offsets


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_activations_give_the_same_bits(backend: str, use_reentrant: bool) -> None:
    inputs = random_inputs(SIZES[0], seed=7)
    order = permutation(inputs, backend)
    expected = results(inputs, backend)
    leaves = leaves_of(inputs)
    out = checkpoint(
        lambda *leaves: apply(list(leaves), order, backend), *leaves, use_reentrant=use_reentrant
    )
    out.backward(inputs.grad_out)
    for name, leaf in zip(LEAVES, leaves, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_gives_the_same_bits(backend: str) -> None:
    inputs = random_inputs(SIZES[0], seed=8)
    leaves, order = leaves_of(inputs), permutation(inputs, backend)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            out = apply(leaves, order, backend)
        assert not out.requires_grad and torch.equal(out, results(inputs, backend)["out"])


def test_experts_compile_as_one_graph() -> None:
    inputs = random_inputs(SIZES[0], seed=9)
    leaves, order = leaves_of(inputs), permutation(inputs, "csrc")

    def twice(*leaves: torch.Tensor) -> torch.Tensor:
        return 2 * apply(list(leaves), order, "csrc")

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    out, expected = compiled(*leaves), twice(*leaves)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    for grad, other in zip(
        grads, torch.autograd.grad(expected, leaves, inputs.grad_out), strict=True
    ):
        assert torch.equal(grad, other)


def test_only_the_buffers_of_weight_gradients_are_written() -> None:
    inputs = random_inputs(SIZES[1], "elsewhere", seed=10)
    operations = torch.ops.megatron_kanana
    order = tuple(vars(permutation(inputs, "csrc")).values())
    weights = (inputs.gate_up, inputs.down)
    arguments = (inputs.hidden_states, inputs.weights, *order, *weights)
    _, pre_activation = operations.moe_experts_forward(*arguments)
    buffers = [torch.zeros_like(weight) for weight in weights]
    for operation, tensors in (
        (operations.moe_experts_forward, arguments),
        (operations.moe_experts_backward, (inputs.grad_out, *arguments, pre_activation, *buffers)),
    ):
        torch.library.opcheck(operation.default, tensors, test_utils=("test_schema",))


NARROW_PROGRAM = """
import sys, torch
from tests.kernels.moe_reference import random_inputs
from tests.kernels.test_moe_experts import SIZES, check_results
from tests.kernels.test_moe_routing import ROUTES, check_route
assert torch.ops.megatron_kanana.cpu_instruction_set() == sys.argv[1]
for sizes in ROUTES:
    check_route("csrc", sizes, True)
for sizes in SIZES:
    check_results(random_inputs(sizes, "elsewhere"), "csrc", 1e-6)
check_results(random_inputs(SIZES[0], dtype=torch.bfloat16), "csrc", 2**-8)
"""


@pytest.mark.parametrize(("capability", "name"), [("avx2", "avx2"), ("default", "baseline")])
def test_processors_with_narrower_vectors_compute_the_same(capability: str, name: str) -> None:
    """In a process in which torch, and so our operations, are told to use less than there is."""
    if capability == "avx2" and torch.ops.megatron_kanana.cpu_instruction_set() == "baseline":
        pytest.skip("this processor has no AVX2")
    subprocess.run(
        [sys.executable, "-c", NARROW_PROGRAM, name],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# Two tokens of two slots, three rows, two experts, a hidden size of 4 and a width of 3.
RIGHT = {
    "hidden_states": torch.zeros(2, 4),
    "weights": torch.zeros(2, 2),
    "offsets": ints(0, 1, 3),
    "slot_of_row": ints(1, 0, 3),
    "row_of_slot": ints(1, 0, -1, 2).view(2, 2),
    "gate_up": torch.zeros(2, 6, 4),
    "down": torch.zeros(2, 4, 3),
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_states": torch.zeros(2)}, "hidden_states must have shape [tokens, hidden size]"),
    ({"hidden_states": torch.zeros(2, 4).half()}, "hidden_states must be float32 or bfloat16"),
    ({"hidden_states": torch.zeros(4, 2).T}, "hidden_states must be contiguous"),
    ({"weights": torch.zeros(3, 2)}, "weights must have shape [2, 2], got [3, 2]"),
    ({"weights": torch.zeros(2, 2).bfloat16()}, "weights must be Float, got BFloat16"),
    ({"offsets": ints(0, 3)}, "offsets must have shape [3], got [2]"),
    ({"offsets": ints(0, 2, 1)}, "offsets must not fall, got 1 after 2"),
    ({"offsets": ints(0, 1, 2)}, "offsets must go from 0 to 3, got 0 and 2"),
    ({"slot_of_row": ints(1, 0, 4)}, "slot_of_row must have numbers from 0 to 3, got 4 at place 2"),
    ({"slot_of_row": ints(0, 1, 2, 3, 0)}, "slot_of_row must have at most the 4 slots, got 5"),
    ({"row_of_slot": ints(1, 0, 3, 2).view(2, 2)}, "row_of_slot must have numbers from -1 to 2"),
    ({"row_of_slot": torch.zeros(2, 2)}, "row_of_slot must be Int, got Float"),
    ({"gate_up": torch.zeros(2, 4, 6)}, "gate_up must have shape [2, 6, 4], got [2, 4, 6]"),
    ({"gate_up": torch.zeros(2, 6, 4).bfloat16()}, "gate_up must be Float, got BFloat16"),
    ({"down": torch.zeros(2, 4)}, "down must have shape [experts, hidden size, width]"),
    ({"down": torch.zeros(2, 4, 0), "gate_up": torch.zeros(2, 0, 4)}, "down must not be empty"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_inputs_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    torch.ops.megatron_kanana.moe_experts_forward(*RIGHT.values())
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.megatron_kanana.moe_experts_forward(*(RIGHT | wrong).values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad_out": torch.zeros(2, 5)}, "grad_out must have shape [2, 4], got [2, 5]"),
        ({"pre_activation": torch.zeros(3, 5)}, "pre_activation must have shape [3, 6]"),
        ({"grad_gate_up": torch.zeros(2, 6, 4).bfloat16()}, "grad_gate_up must be Float"),
        ({"grad_down": torch.zeros(2, 3, 4).mT}, "grad_down must be contiguous"),
    ],
)
def test_wrong_inputs_of_the_backward_pass_are_refused_by_name(
    wrong: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "grad_out": torch.zeros(2, 4),
        **RIGHT,
        "pre_activation": torch.zeros(3, 6),
        "grad_gate_up": torch.zeros(2, 6, 4),
        "grad_down": torch.zeros(2, 4, 3),
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.megatron_kanana.moe_experts_backward(*(arguments | wrong).values())


def test_a_second_backward_pass_through_the_same_graph_is_refused() -> None:
    inputs = random_inputs(Sizes(20, 2, 4, 64, 64))
    order = permutation_of(inputs.chosen, 4, inputs.rows, backend="csrc")
    gate_up, down = (tensor.requires_grad_() for tensor in (inputs.gate_up, inputs.down))
    given = (inputs.hidden_states.requires_grad_(), inputs.weights, order, gate_up, down)
    out = routed_experts(*given, backend="csrc").sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
