"""Gradients of experts' weights go into megatron-core's fp32 buffer, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.utils.checkpoint import checkpoint

from megatron_kanana.kernels.moe import gated_mlp, permutation_of, routed_experts
from megatron_kanana.kernels.native import native_library_error

from .moe_reference import Inputs, Sizes, float64_results, random_inputs

assert native_library_error() is None

BACKENDS = ["csrc", "torch"]
SIZES = Sizes(60, 2, 8, 24, 16)


class Experts(torch.nn.Module):
    """Routed experts, and one that every token visits."""

    def __init__(self, inputs: Inputs, backend: str) -> None:
        super().__init__()
        self.gate_up = torch.nn.Parameter(inputs.gate_up.clone())
        self.down = torch.nn.Parameter(inputs.down.clone())
        self.shared_gate_up = torch.nn.Parameter(inputs.gate_up[0].clone())
        self.shared_down = torch.nn.Parameter(inputs.down[0].clone())
        self.backend = backend

    def forward(self, inputs: Inputs) -> torch.Tensor:
        order = permutation_of(inputs.chosen, len(self.down), inputs.rows, backend=self.backend)
        hidden_states, weights = inputs.hidden_states, inputs.weights
        routed = routed_experts(
            hidden_states, weights, order, self.gate_up, self.down, backend=self.backend
        )
        return routed + gated_mlp(
            hidden_states, self.shared_gate_up, self.shared_down, backend=self.backend
        )


def expected_gradients(microbatches: list[Inputs]) -> dict[str, torch.Tensor]:
    """Sums over the microbatches, in float64, by name of the parameter."""
    sums: dict[str, torch.Tensor] = {}
    for inputs in microbatches:
        tokens = len(inputs.hidden_states)
        shared = Inputs(
            inputs.hidden_states,
            torch.ones(tokens, 1),
            torch.zeros(tokens, 1, dtype=torch.int32),
            microbatches[0].gate_up[:1],
            microbatches[0].down[:1],
            inputs.grad_out,
        )
        routed = float64_results(
            Inputs(
                **{**vars(inputs), "gate_up": microbatches[0].gate_up, "down": microbatches[0].down}
            )
        )
        for prefix, found in (("", routed), ("shared_", float64_results(shared))):
            for name in ("gate_up", "down"):
                grad = found[name] if prefix == "" else found[name][0]
                sums[prefix + name] = sums.get(prefix + name, torch.tensor(0.0)) + grad
    return sums


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """megatron-core's process groups of this process alone, on the CPU."""
    from megatron.core import parallel_state

    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def data_parallel(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """The module behind megatron-core's data parallelism."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped: torch.nn.Module = DistributedDataParallel(
        config, DistributedDataParallelConfig(**options), module
    )
    return wrapped


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "overlapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_microbatches_add_up_in_the_buffer_of_data_parallelism(
    one_process: None, backend: str, dtype: torch.dtype, overlap: bool
) -> None:
    microbatches = [random_inputs(SIZES, seed=seed, dtype=dtype) for seed in (0, 1)]
    module = Experts(microbatches[0], backend)
    wrapped: Any = data_parallel(
        module, grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=4000
    )
    for _ in range(2):  # the buffer is zeroed between steps
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            wrapped(microbatches[0]).backward(microbatches[0].grad_out)
        wrapped(microbatches[1]).backward(microbatches[1].grad_out)
        wrapped.finish_grad_sync()
    expected = expected_gradients(microbatches)
    # Plain products round a gradient of each microbatch to bf16; ours add up in fp32.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8 if backend == "csrc" else 2**-7
    for name, parameter in module.named_parameters():
        main_grad = parameter.main_grad  # type: ignore[attr-defined]
        assert main_grad.dtype == torch.float32 and parameter.grad is None
        error = float((main_grad.double() - expected[name]).norm())
        assert error < tolerance * float(expected[name].norm()), name


@pytest.mark.parametrize("use_reentrant", [True, False, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_layers_add_to_the_same_buffer(backend: str, use_reentrant: bool | None) -> None:
    inputs = random_inputs(SIZES, seed=2)
    module = Experts(inputs, backend)
    for parameter in module.parameters():
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    inputs.hidden_states.requires_grad_()
    if use_reentrant is None:
        out = module(inputs)
    else:
        out = checkpoint(
            lambda hidden_states: module(
                Inputs(**{**vars(inputs), "hidden_states": hidden_states})
            ),
            inputs.hidden_states,
            use_reentrant=use_reentrant,
        )
    out.backward(inputs.grad_out)
    inputs.hidden_states = inputs.hidden_states.detach()
    expected = expected_gradients([inputs])
    for name, parameter in module.named_parameters():
        assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
        # A zero in memory, for hooks that ask whether there is a gradient.
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        assert parameter.grad.untyped_storage().nbytes() == 4 and not parameter.grad.any()
        main_grad = parameter.main_grad - 1  # type: ignore[attr-defined]
        torch.testing.assert_close(main_grad, expected[name].float(), atol=1e-4, rtol=1e-5)


def allocated_bytes(events: list[Any]) -> list[int]:
    """Sizes of all allocations in a profiler's tree of events."""
    sizes = []
    for event in events:
        if event.name == "[memory]":
            sizes.append(event.extra_fields.alloc_size)
        sizes += allocated_bytes(event.children)
    return sizes


@pytest.mark.parametrize("has_buffer", [True, False])
def test_backward_allocates_no_tensor_as_large_as_the_weights(has_buffer: bool) -> None:
    inputs = random_inputs(Sizes(10, 1, 200, 64, 32), "one expert", seed=3)
    order = permutation_of(inputs.chosen, 200, inputs.rows, backend="csrc")
    parameters = [torch.nn.Parameter(weight) for weight in (inputs.gate_up, inputs.down)]
    if has_buffer:
        for parameter in parameters:
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    out = routed_experts(inputs.hidden_states, inputs.weights, order, *parameters, backend="csrc")
    with torch.profiler.profile(profile_memory=True) as profile:
        out.backward(inputs.grad_out)
    events = profile.profiler.kineto_results.experimental_event_tree()
    sizes = allocated_bytes(events)
    assert sizes
    assert (max(sizes) < inputs.down.nbytes) == has_buffer


def test_compiled_layers_return_their_gradients() -> None:
    inputs = random_inputs(SIZES, seed=6)
    module = Experts(inputs, "csrc")
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def run(hidden_states: torch.Tensor) -> torch.Tensor:
        order = permutation_of(inputs.chosen, len(module.down), inputs.rows, backend="csrc")
        return routed_experts(
            hidden_states, inputs.weights, order, module.gate_up, module.down, backend="csrc"
        )

    out = torch.compile(run, backend="aot_eager", fullgraph=True)(inputs.hidden_states)
    out.backward(inputs.grad_out)
    expected = float64_results(inputs)
    for name in ("gate_up", "down"):
        parameter = getattr(module, name)
        torch.testing.assert_close(parameter.grad, expected[name].float(), atol=1e-4, rtol=1e-5)
        assert not parameter.grad_added_to_main_grad and not parameter.main_grad.any()


def test_a_buffer_of_another_dtype_is_left_to_its_owner() -> None:
    inputs = random_inputs(SIZES, seed=4, dtype=torch.bfloat16)
    module = Experts(inputs, "csrc")
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    module(inputs).backward(inputs.grad_out)
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.any()
        assert not parameter.main_grad.any()  # type: ignore[attr-defined]
        assert not parameter.grad_added_to_main_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_have_no_gradient(backend: str) -> None:
    inputs = random_inputs(SIZES, seed=5)
    module = Experts(inputs, backend).requires_grad_(False)
    inputs.hidden_states.requires_grad_()
    module(inputs).backward(inputs.grad_out)
    assert inputs.hidden_states.grad is not None and inputs.hidden_states.grad.any()
    assert all(parameter.grad is None for parameter in module.parameters())
