"""csrc's experts on a Hopper GPU against float64. Needs torch and this package alone:

python -m pytest --noconftest tests/kernels/test_moe_sm90.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from megatron_kanana.kernels.moe import (
    Permutation,
    count_tokens,
    gated_mlp,
    permutation_of,
    route,
    routed_experts,
)

from .moe_reference import LOADS, Inputs, Sizes, random_inputs

pytestmark = pytest.mark.gpu

RMS_ERROR = 7e-3  # over that of the exact tensor: a little over bf16's rounding
LARGEST_ERROR = 0.08  # over the root of the mean square of the same token or matrix
SIZES = [(64, 64), (128, 64), (192, 320), (2048, 768), (4096, 1536)]  # hidden size, width
COUNTS = (0, 1, 63, 64, 65, 0, 127, 128, 129, 255, 256, 257)  # rows of the experts, in turn
NAMES = ("output", "hidden states", "weights", "gate and up", "down")


def cuda_inputs(sizes: Sizes, load: str = "uniform", *, seed: int = 0) -> Inputs:
    """Random tensors in bf16 on the GPU."""
    return to_cuda(random_inputs(sizes, load, seed=seed, dtype=torch.bfloat16))


def to_cuda(inputs: Inputs) -> Inputs:
    """The same numbers on the GPU."""
    return Inputs(**{name: tensor.cuda() for name, tensor in vars(inputs).items()})


def inputs_with_counts(counts: tuple[int, ...], hidden: int, width: int) -> Inputs:
    """As many rows of each expert, one expert a token, tokens in a random order."""
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    sizes = Sizes(len(chosen), 1, len(counts), hidden, width)
    inputs = random_inputs(sizes, dtype=torch.bfloat16)
    return to_cuda(dataclasses.replace(inputs, chosen=chosen[order, None].int()))


def permutation(inputs: Inputs) -> Permutation:
    """Order of the rows."""
    return permutation_of(inputs.chosen, len(inputs.down), inputs.rows, backend="csrc")


def float64_results(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and gradients by name, expert by expert."""
    hidden_states, weights = (
        tensor.double().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights)
    )
    gate_ups, downs, out = [], [], torch.zeros_like(hidden_states)
    for expert in range(len(inputs.down)):
        gate_up = inputs.gate_up[expert].double().requires_grad_()
        down = inputs.down[expert].double().requires_grad_()
        tokens, slots = (inputs.chosen == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[tokens] @ gate_up.T).chunk(2, dim=1)
        rows = (gate * gate.sigmoid() * up) @ down.T * weights[tokens, slots][:, None]
        out = out.index_add(0, tokens, rows)
        gate_ups.append(gate_up)
        downs.append(down)
    leaves = [hidden_states, weights, *gate_ups, *downs]
    grads = torch.autograd.grad(out, leaves, inputs.grad_out.double())
    experts = len(downs)
    stacked = torch.stack(grads[2 : 2 + experts]), torch.stack(grads[2 + experts :])
    return dict(zip(NAMES, (out.detach(), *grads[:2], *stacked), strict=True))


def with_main_grad(tensor: torch.Tensor, main_grad: torch.Tensor | None = None) -> Any:
    """A leaf whose gradient is collected in fp32, as under megatron-core's data parallelism."""
    parameter: Any = tensor.detach().requires_grad_()
    parameter.main_grad = torch.zeros_like(tensor, dtype=torch.float32)
    if main_grad is not None:
        parameter.main_grad.copy_(main_grad)
    parameter.grad_added_to_main_grad = False
    return parameter


def results(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and gradients by name; those of the experts' weights in fp32."""
    hidden_states, weights = (
        tensor.detach().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights)
    )
    gate_up, down = with_main_grad(inputs.gate_up), with_main_grad(inputs.down)
    out = routed_experts(hidden_states, weights, permutation(inputs), gate_up, down, backend="csrc")
    out.backward(inputs.grad_out)
    assert gate_up.grad_added_to_main_grad and down.grad_added_to_main_grad
    found = (out.detach(), hidden_states.grad, weights.grad, gate_up.main_grad, down.main_grad)
    return dict(zip(NAMES, found, strict=True))


def check(inputs: Inputs) -> None:
    """Output and gradients beside float64."""
    found, exact = results(inputs), float64_results(inputs)
    for name in NAMES:
        compare(name, found[name], exact[name])
    elsewhere = inputs.chosen < 0
    assert not found["weights"][elsewhere].any()
    assert not found["output"][elsewhere.all(1)].any()


def compare(name: str, found: torch.Tensor, exact: torch.Tensor) -> None:
    """One result within its limits: as a whole, and each element."""
    assert found.shape == exact.shape, name
    if not exact.numel():
        return
    error = (found.double() - exact).abs()
    size = float(exact.square().mean().sqrt())
    assert float(error.square().mean().sqrt()) <= RMS_ERROR * size, name
    # Tokens and experts by themselves; one row of a matrix may be a difference of large numbers.
    apart = name in NAMES[:2] or exact.dim() == 3
    parts = exact.flatten(1) if apart else exact.reshape(1, -1)
    sizes = parts.square().mean(1, keepdim=True).sqrt()
    largest = error.reshape(parts.shape) - 0.02 * parts.abs()
    assert bool((largest <= LARGEST_ERROR * sizes).all()), name


def launches(function: object) -> int:
    """Kernels, copies and fills that a call runs on the GPU."""
    assert callable(function)
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events())


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises where torch waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("hidden", "width"), [(128, 64), (256, 192)])
def test_loads(load: str, hidden: int, width: int) -> None:
    check(cuda_inputs(Sizes(700, 4, 16, hidden, width), load, seed=1))


@pytest.mark.parametrize(("hidden", "width"), SIZES)
def test_sizes(hidden: int, width: int) -> None:
    check(cuda_inputs(Sizes(450, 3, 8, hidden, width), "Zipf", seed=hidden))


@pytest.mark.parametrize("experts", [1, 2, 3, 31, 64, 128, 256])
def test_numbers_of_experts(experts: int) -> None:
    check(cuda_inputs(Sizes(500, min(experts, 6), experts, 128, 128), "Zipf", seed=experts))


@pytest.mark.parametrize("slots", [1, 2, 8, 16])
def test_experts_of_a_token(slots: int) -> None:
    check(cuda_inputs(Sizes(300, slots, 32, 192, 64), "Zipf", seed=slots))


@pytest.mark.parametrize("counts", [COUNTS, COUNTS[::-1]])
@pytest.mark.parametrize(("hidden", "width"), [(64, 64), (320, 192)])
def test_rows_of_an_expert(counts: tuple[int, ...], hidden: int, width: int) -> None:
    check(inputs_with_counts(counts, hidden, width))


@pytest.mark.parametrize("tokens", [0, 1, 2, 129])
def test_few_tokens(tokens: int) -> None:
    check(cuda_inputs(Sizes(tokens, 6, 128, 128, 64), seed=tokens))


def test_slots_that_are_all_elsewhere() -> None:
    inputs = cuda_inputs(Sizes(100, 4, 8, 128, 64))
    inputs.chosen.fill_(-1)
    found = results(inputs)
    for name in NAMES:
        assert not found[name].any(), name


def test_a_layer_of_30b_in_small() -> None:
    check(cuda_inputs(Sizes(2048, 6, 128, 2048, 768), "Zipf", seed=3))


def test_gradients_are_added_to_what_is_there() -> None:
    inputs = cuda_inputs(Sizes(400, 4, 8, 192, 128), "Zipf")
    alone = results(inputs)
    before = [
        torch.randn_like(tensor, dtype=torch.float32) for tensor in (inputs.gate_up, inputs.down)
    ]
    parameters = [
        with_main_grad(tensor, value)
        for tensor, value in zip((inputs.gate_up, inputs.down), before, strict=True)
    ]
    for _ in range(2):
        out = routed_experts(
            inputs.hidden_states, inputs.weights, permutation(inputs), *parameters, backend="csrc"
        )
        out.backward(inputs.grad_out)
    for parameter, value, name in zip(parameters, before, NAMES[3:], strict=True):
        expected = value.double() + 2 * alone[name].double()
        torch.testing.assert_close(parameter.main_grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load", ["Zipf", "elsewhere"])
def test_every_run_has_the_same_bits(load: str) -> None:
    inputs = cuda_inputs(Sizes(3000, 6, 32, 512, 256), load)
    first = results(inputs)
    for _ in range(4):
        again = results(inputs)
        for name in NAMES:
            assert torch.equal(again[name], first[name]), name


def test_nothing_waits_for_the_gpu() -> None:
    inputs = cuda_inputs(Sizes(500, 4, 16, 128, 64), "Zipf")
    logits = torch.randn(500, 16, device="cuda", requires_grad=True)
    bias, counts = torch.randn(16, device="cuda"), torch.zeros(16, device="cuda")
    hidden_states, gate_up, down = (
        tensor.detach().requires_grad_()
        for tensor in (inputs.hidden_states, inputs.gate_up, inputs.down)
    )

    def layer() -> None:
        weights, experts = route(logits, bias, num_experts_per_token=4, backend="csrc")
        count_tokens(experts, counts, backend="csrc")
        order = permutation_of(experts, 16, 2000, backend="csrc")
        out = routed_experts(hidden_states, weights, order, gate_up, down, backend="csrc")
        out = out + gated_mlp(hidden_states, gate_up[0], down[0], backend="csrc")
        out.backward(inputs.grad_out)

    layer()
    with no_synchronisation():
        layer()
    torch.cuda.synchronize()
    assert float(counts.sum()) == 2 * 2000


def test_a_layer_is_captured_in_a_graph_and_replayed_on_other_tokens() -> None:
    # Whatever waits for the GPU or depends on a number that lies there cannot be captured.
    inputs = cuda_inputs(Sizes(600, 4, 16, 128, 64), "Zipf")
    other = cuda_inputs(Sizes(600, 4, 16, 128, 64), "half empty", seed=1)
    operations = torch.ops.megatron_kanana
    gradients = [
        torch.zeros_like(tensor, dtype=torch.float32) for tensor in (inputs.gate_up, inputs.down)
    ]

    def layer() -> tuple[torch.Tensor, ...]:
        order = operations.moe_permutation(inputs.chosen, 16, 2400)
        given = (inputs.hidden_states, inputs.weights, *order, inputs.gate_up, inputs.down)
        out, pre_activation = operations.moe_experts_forward(*given)
        for gradient in gradients:
            gradient.zero_()
        grads = operations.moe_experts_backward(inputs.grad_out, *given, pre_activation, *gradients)
        return out, *grads

    results(inputs)  # loads the operations
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for name, tensor in vars(inputs).items():
        tensor.copy_(getattr(other, name))
    graph.replay()
    expected = results(other)
    for name, value in zip(NAMES, (*captured, *gradients), strict=True):
        assert torch.equal(value, expected[name]), name


def test_launches_do_not_depend_on_the_number_of_experts() -> None:
    counts = set()
    for experts in (8, 32, 128, 256):
        inputs = cuda_inputs(Sizes(512, 6, experts, 128, 64), "Zipf")
        counts.add(launches(lambda inputs=inputs: results(inputs)))
    assert len(counts) == 1, counts


def test_what_is_kept_for_the_backward_pass() -> None:
    sizes = Sizes(1000, 6, 16, 256, 128)
    inputs = cuda_inputs(sizes, "Zipf")
    order = permutation(inputs)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = inputs.weights.detach().requires_grad_()
    parameters = [tensor.detach().requires_grad_() for tensor in (inputs.gate_up, inputs.down)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routed_experts(inputs.hidden_states, weights, order, *parameters, backend="csrc")
    routing = (weights, *vars(order).values())
    known = sum(
        tensor.untyped_storage().nbytes()
        for tensor in (*parameters, inputs.hidden_states, *routing)
    )
    assert sum(kept.values()) == known + 2 * 2 * sizes.slots * sizes.tokens * sizes.width


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 127, 129, 257])
@pytest.mark.parametrize(("hidden", "width"), [(64, 64), (192, 320)])
def test_shared_experts(tokens: int, hidden: int, width: int) -> None:
    check_gated_mlp(tokens, hidden, width)


@pytest.mark.parametrize(("hidden", "width"), [(2048, 1536), (4096, 3072)])
def test_shared_experts_of_kanana_2(hidden: int, width: int) -> None:
    check_gated_mlp(1000, hidden, width)


def check_gated_mlp(tokens: int, hidden: int, width: int) -> None:
    """Output and gradients of shared experts beside float64."""
    inputs = cuda_inputs(Sizes(tokens, 1, 1, hidden, width), seed=tokens)
    given = (inputs.hidden_states, inputs.gate_up[0], inputs.down[0])
    leaves = [inputs.hidden_states.detach().requires_grad_(), *map(with_main_grad, given[1:])]
    out = gated_mlp(*leaves, backend="csrc")
    out.backward(inputs.grad_out)
    found = [out.detach(), leaves[0].grad, leaves[1].main_grad, leaves[2].main_grad]
    hidden_states, gate_up, down = (tensor.double().requires_grad_() for tensor in given)
    gate, up = (hidden_states @ gate_up.T).chunk(2, dim=1)
    out = (F.silu(gate) * up) @ down.T
    grads = torch.autograd.grad(out, (hidden_states, gate_up, down), inputs.grad_out.double())
    exact = [out.detach(), *grads]
    for name, value, right in zip((NAMES[0], NAMES[1], *NAMES[3:]), found, exact, strict=True):
        compare(name, value, right)


def test_more_rows_than_one_wave_of_blocks() -> None:
    inputs = cuda_inputs(Sizes(16384, 6, 64, 128, 64), "Zipf")
    check(inputs)


def test_other_dtypes_and_widths_are_refused_by_name() -> None:
    for sizes, dtype in (
        (Sizes(20, 2, 4, 96, 64), torch.bfloat16),
        (Sizes(20, 2, 4, 64, 32), torch.bfloat16),
        (Sizes(20, 2, 4, 64, 64), torch.float32),
    ):
        inputs = to_cuda(random_inputs(sizes, dtype=dtype))
        with pytest.raises(RuntimeError, match=r"multiples of 64|bfloat16|float32"):
            results(inputs)
