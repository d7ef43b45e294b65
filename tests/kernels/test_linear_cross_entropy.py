"""Losses without whole logits, their gradients and memory, against torch's in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_kanana.kernels.linear_cross_entropy import linear_cross_entropy

BACKENDS = ("csrc", "torch")
DTYPES = (torch.float32, torch.bfloat16)
# Of norms. In bf16 logits are rounded, as everywhere.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
# Tokens, hidden size, words, tokens of a chunk. Of few tokens logits are kept, without chunks.
SIZES = {
    "many tokens": (300, 16, 131, 300),
    "chunks": (300, 16, 131, 64),
    "chunks of one token": (70, 8, 19, 1),
    "few tokens": (20, 64, 1031, 8),
    "one token": (1, 8, 17, 1),
    "no token": (0, 8, 17, 1),
    "one word": (40, 4, 1, 7),
}
FACTOR = 0.37


class Problem:
    """Random tensors; `weights` are zero where tokens are ignored."""

    def __init__(self, tokens: int, hidden: int, words: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(tokens + words)
        self.hidden_states = torch.randn(tokens, hidden, generator=generator).to(dtype)
        self.weight = (torch.randn(words, hidden, generator=generator) / 2).to(dtype)
        self.labels = torch.randint(words, (tokens,), generator=generator)
        self.weights = torch.rand(tokens, generator=generator)
        self.weights[torch.rand(tokens, generator=generator) < 0.3] = 0.0
        self.labels[self.weights == 0] = -100  # no word of any process

    def found(self, known: bool, backend: str, chunk: int, **options: Any) -> list[torch.Tensor]:
        """Losses, and gradients of hidden states and weight, with weights known before or not."""
        leaves = [each.clone().requires_grad_() for each in (self.hidden_states, self.weight)]
        losses = linear_cross_entropy(
            *leaves,
            self.labels,
            self.weights if known else None,
            backend=backend,
            chunk_bytes=chunk * self.weight[:, 0].nbytes,
            **options,
        )
        (losses * self.weights * FACTOR).sum().backward()
        return [losses.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def expected(self) -> list[torch.Tensor]:
        """The same of torch in float64, the losses of ignored tokens being zero."""
        leaves = [each.double().requires_grad_() for each in (self.hidden_states, self.weight)]
        logits = leaves[0] @ leaves[1].T
        losses = F.cross_entropy(logits, self.labels, reduction="none", ignore_index=-100)
        (losses * self.weights * FACTOR).sum().backward()
        return [losses.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float, floor: float = 1e-30
) -> None:
    """Norms: a single element may be small by cancellation."""
    assert found.shape == expected.shape
    error = (found.double() - expected).norm() / expected.norm().clamp(min=floor)
    assert float(error) <= tolerance


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, as it does in deterministic runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("known", [True, False], ids=["weights known", "weights not known"])
def test_losses_and_gradients_are_those_of_torch(
    known: bool, sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    tokens, hidden, words, chunk = sizes
    problem = Problem(tokens, hidden, words, dtype)
    found, expected = problem.found(known, backend, chunk), problem.expected()
    assert found[0].dtype == torch.float32
    assert [each.dtype for each in found[1:]] == [dtype, dtype]
    counts = problem.weights > 0
    floor = 1.0 if words == 1 else 1e-30  # the only word's loss is zero
    assert_near(found[0][counts], expected[0][counts], TOLERANCE[dtype], floor)
    for gradient, right in zip(found[1:], expected[1:], strict=True):
        assert_near(gradient, right, TOLERANCE[dtype], floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["many tokens", "chunks", "few tokens"])
@pytest.mark.parametrize("known", [True, False], ids=["weights known", "weights not known"])
def test_nothing_is_read_of_memory_that_was_not_written(
    known: bool, size: str, dtype: torch.dtype, backend: str
) -> None:
    tokens, hidden, words, chunk = SIZES[size]
    problem = Problem(tokens, hidden, words, dtype)
    with new_memory_is_nan():
        found = problem.found(known, backend, chunk)
    for value, right in zip(found, problem.found(known, backend, chunk), strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_gradient_of_the_losses_is_right_where_weights_are_not_given(backend: str) -> None:
    problem = Problem(300, 16, 131, torch.float32)
    problem.weights = torch.randn(300, generator=torch.Generator().manual_seed(0))
    problem.labels.clamp_(min=0)
    found = problem.found(False, backend, 64)
    for value, right in zip(found, problem.expected(), strict=True):
        assert_near(value, right, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_neither_overflow_nor_lose_digits(backend: str) -> None:
    problem = Problem(200, 16, 131, torch.float32)
    problem.hidden_states *= 300
    found, expected = problem.found(True, backend, 64), problem.expected()
    counts = problem.weights > 0
    assert found[0].max() > 1000
    torch.testing.assert_close(found[0][counts].double(), expected[0][counts], rtol=1e-5, atol=1e-3)
    for gradient, right in zip(found[1:], expected[1:], strict=True):
        assert_near(gradient, right, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_token_alone(bad: float, backend: str) -> None:
    problem = Problem(300, 16, 131, torch.float32)
    problem.hidden_states[7, 3] = bad
    losses = linear_cross_entropy(
        problem.hidden_states, problem.weight, problem.labels, backend=backend
    )
    assert losses[7].isnan() and losses.isfinite().sum() == 299


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", ["chunks", "few tokens"])
def test_evaluation_gives_the_bits_of_training(size: str, backend: str) -> None:
    tokens, hidden, words, chunk = SIZES[size]
    problem = Problem(tokens, hidden, words, torch.float32)
    with torch.no_grad():
        options: dict[str, Any] = {"backend": backend, "chunk_bytes": 4 * words * chunk}
        tensors = problem.hidden_states, problem.weight.clone().requires_grad_(), problem.labels
        losses = linear_cross_entropy(*tensors, problem.weights, **options)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, problem.found(True, backend, chunk)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", ["chunks", "few tokens"])
def test_weight_gradients_are_added_to_main_grad_over_microbatches(size: str, known: bool) -> None:
    tokens, hidden, words, chunk = SIZES[size]
    problem = Problem(tokens, hidden, words, torch.bfloat16)
    weight: Any = torch.nn.Parameter(problem.weight.clone())
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    weights = problem.weights if known else None
    for factor in (0.5, -2.0, FACTOR + 1.5):
        losses = linear_cross_entropy(
            problem.hidden_states,
            weight,
            problem.labels,
            weights,
            backend="csrc",
            chunk_bytes=2 * words * chunk,
        )
        (losses * problem.weights * factor).sum().backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.untyped_storage().nbytes() == weight.element_size()  # a zero, expanded
    assert_near(weight.main_grad - 1, problem.expected()[2], 1.5e-2)


def test_weights_that_the_gradient_is_no_multiple_of_are_refused() -> None:
    problem = Problem(300, 16, 131, torch.float32)
    weight = problem.weight.requires_grad_()
    tensors = problem.hidden_states, weight, problem.labels.clamp(min=0)
    losses = linear_cross_entropy(*tensors, problem.weights, backend="torch")
    with pytest.raises(RuntimeError, match="not proportional to weights_T; leave weights_T out"):
        losses.sum().backward()
    losses = linear_cross_entropy(*tensors, problem.weights, backend="torch")
    (losses * torch.nan).sum().backward()
    assert weight.grad is not None and weight.grad.isnan().all()


class LargestTensor(TorchDispatchMode):
    """Follows the most elements any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [True, False])
def test_no_tensor_of_tokens_by_words_exists(known: bool, backend: str) -> None:
    tokens, hidden, words, chunk = 600, 16, 203, 50
    problem = Problem(tokens, hidden, words, torch.float32)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with LargestTensor() as largest, hooks:
        problem.found(known, backend, chunk)
    assert largest.elements == max(chunk * 208, tokens * hidden)  # 208: rows are aligned
    kept = sum(tensor.nbytes for tensor in saved if tensor.shape != (tokens,))
    of_weight = 4 * words * hidden
    most = 4 * tokens * hidden + of_weight + (0 if known else 3 * 4 * tokens)
    assert kept <= most < tokens * words


def wrong_arguments() -> Iterator[tuple[dict[str, Any], str]]:
    """Changed arguments, and what is said of them."""
    yield {"weight_VD": torch.zeros(17, 9)}, "weight [words, hidden size], got [4, 8] and [17, 9]"
    yield {"weight_VD": torch.zeros(17, 8).bfloat16()}, "both be float32 or both bfloat16"
    yield {"labels_T": torch.zeros(5, dtype=torch.long)}, "labels must be torch.int64 [4]"
    yield {"labels_T": torch.zeros(4, dtype=torch.int32)}, "got torch.int32 [4]"
    yield {"weights_T": torch.zeros(4).double()}, "weights must be torch.float32 [4]"


@pytest.mark.parametrize(("wrong", "message"), wrong_arguments())
def test_wrong_arguments_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_states_TD": torch.zeros(4, 8),
        "weight_VD": torch.zeros(17, 8),
        "labels_T": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        linear_cross_entropy(**(arguments | wrong), backend="torch")


def test_operations_refuse_what_they_cannot_read() -> None:
    logits, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)
    operations = torch.ops.megatron_kanana
    with pytest.raises(RuntimeError, match="rows of logits must be contiguous and apart"):
        operations.cross_entropy_statistics(torch.zeros(8, 4).T, labels, 0)
    with pytest.raises(RuntimeError, match="logits must be float32 or bfloat16, got Double"):
        operations.cross_entropy_statistics(logits.double(), labels, 0)
    with pytest.raises(RuntimeError, match="statistics must have shape"):
        operations.cross_entropy_gradient(logits, labels, 0, torch.zeros(2, 4), torch.zeros(4))
    with pytest.raises(RuntimeError, match="weights must be Float, got Double"):
        weights = torch.zeros(4).double()
        operations.cross_entropy_gradient(logits, labels, 0, torch.zeros(3, 4), weights)
