"""What another order of summation does to a run: the noise that tolerances are taken from.

Splitting a layer over processes rounds parts of its sums before they are added. The same is done
here on one process: every product of megatron-core's parallel layers, forward and backward, is the
sum of two, over halves of its terms that a seed chooses, each rounded to the dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

Halves = tuple[torch.Tensor, torch.Tensor]


@contextlib.contextmanager
def reordered(seed: int | None) -> Iterator[None]:
    """Inside, products are summed in the order of a seed; None leaves them as they are."""
    if seed is None:
        yield
        return
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    dice = torch.Generator().manual_seed(seed)

    def product(_: Any, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes = (weight.shape[1], weight.shape[0], input[..., 0].numel())
        halves = [halves_of(size, dice, input.device) for size in sizes]
        result: torch.Tensor = _ProductInHalves.apply(input, weight, *halves)
        return result

    with (
        mock.patch.object(ColumnParallelLinear, "_forward_impl", product),
        mock.patch.object(RowParallelLinear, "_forward_impl", product),
    ):
        yield


def halves_of(size: int, dice: torch.Generator, where: torch.device) -> Halves:
    """Two halves of the numbers below `size`, in random order."""
    order = torch.randperm(size, generator=dice).to(where)
    first, second = order.tensor_split(2)
    return first, second


class _ProductInHalves(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        of_inputs: Halves,
        of_outputs: Halves,
        of_rows: Halves,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.halves = of_outputs, of_rows
        first, second = (input[..., half] @ weight[:, half].T for half in of_inputs)
        return first + second

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of_outputs, of_rows = ctx.halves
        of_input = [gradient[..., half] @ weight[half] for half in of_outputs]
        gradient_rows, rows = gradient.flatten(0, -2), input.flatten(0, -2)
        of_weight = [gradient_rows[half].T @ rows[half] for half in of_rows]
        return of_input[0] + of_input[1], of_weight[0] + of_weight[1], None, None, None
