"""csrc's experts in fp8 for a CPU: plain torch, without rounding, of the rows that it is given."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from megatron_kanana.kernels.moe import Permutation, plain
from megatron_kanana.kernels.moe.fp8 import QuantizedWeights

Tensors = tuple[torch.Tensor, ...]


class Operations:
    """The operations that `kernels.moe.fp8` calls.

    Attributes:
        takes_rows: whether it has an operation that quantises rows.
        quantized: address of the rows and whether each had one scale, by quantisation.
        fails: whether the next forward pass of routed experts does.
    """

    def __init__(self, *, takes_rows: bool) -> None:
        self.takes_rows = takes_rows
        self.quantized: list[tuple[int, bool]] = []
        self.fails = False
        self._rows: list[weakref.ref[torch.Tensor]] = []

    @property
    def held(self) -> int:
        """Tensors of quantised rows that somebody holds."""
        return sum(rows() is not None for rows in self._rows)

    def fp8_quantize_rows(self, values: torch.Tensor, whole: bool) -> Tensors:
        """A copy."""
        self.quantized.append((values.data_ptr(), whole))
        data = values.detach().clone()
        self._rows.append(weakref.ref(data))
        return data, data.new_ones(len(data), 1, dtype=torch.float32)

    def _given(self, rows: Tensors, values: torch.Tensor, whole: bool) -> torch.Tensor:
        assert not rows or self.takes_rows
        return (rows or self.fp8_quantize_rows(values, whole))[0]

    def fp8_experts_forward(self, *inputs: Any) -> Tensors:
        hidden_states, weights, *order, gate_up, _, down, _, _ = inputs[:10]
        if self.fails:
            self.fails = False
            raise RuntimeError("the routed experts fail")
        rows = self._given(inputs[10:], hidden_states, False)
        out = plain.routed_experts(rows, weights, Permutation(*order), gate_up, down)
        return out, torch.empty(0, dtype=torch.float8_e4m3fn), torch.empty(0)

    def fp8_gated_mlp_forward(self, *inputs: Any) -> Tensors:
        hidden_states, gate_up, _, down, _, _ = inputs[:6]
        rows = self._given(inputs[6:], hidden_states, False)
        out = plain.gated_mlp(rows, gate_up[0], down[0])
        return out, torch.empty(0, dtype=torch.float8_e4m3fn), torch.empty(0)

    def _backward(self, inputs: Any, given: Tensors, forward: Any) -> list[torch.Tensor]:
        """Gradients of hidden states, gate and up, down, and what else `forward` takes."""
        grad_out, hidden_states, *others = inputs[:-10]
        gate_up, _, down, _, _, _, *sums, in_fp8, _ = inputs[-10:]
        grad_out = self._given(given[:2], grad_out, in_fp8)
        rows = self._given(given[2:], hidden_states, True) if in_fp8 else hidden_states
        taken = [each.detach().requires_grad_() for each in (rows, gate_up.mT, down.mT)]
        taken += [each.detach().requires_grad_() for each in others[:1]]
        with torch.enable_grad():
            out = forward(*taken, *others[1:])
        grads = list(torch.autograd.grad(out, taken, grad_out))
        for buffer, grad in zip(sums, grads[1:3], strict=True):
            buffer.add_(grad.view(buffer.shape))
        return grads

    def fp8_experts_backward(self, *inputs: Any) -> Tensors:
        def forward(rows: Any, gate_up: Any, down: Any, weights: Any, *order: Any) -> torch.Tensor:
            return plain.routed_experts(rows, weights, Permutation(*order), gate_up, down)

        grads = self._backward(inputs[:16], inputs[16:], forward)
        return grads[0], grads[3]

    def fp8_gated_mlp_backward(self, *inputs: Any) -> torch.Tensor:
        def forward(rows: Any, gate_up: Any, down: Any) -> torch.Tensor:
            return plain.gated_mlp(rows, gate_up[0], down[0])

        return self._backward(inputs[:12], inputs[12:], forward)[0]


def quantize_weights(weights: torch.Tensor) -> QuantizedWeights:
    """A copy in both orders."""
    data = weights.detach().clone()
    return QuantizedWeights(data, data.mT.contiguous(), data.new_ones(1))


@contextmanager
def stand_in(*, takes_rows: bool = True) -> Iterator[Operations]:
    """Have the experts in fp8 compute by it; layers are built in here as well.

    Args:
        takes_rows: whether rows may be quantised outside of the operations.
    """
    operations, package = Operations(takes_rows=takes_rows), "megatron_kanana"
    with (
        mock.patch(f"{package}.kernels.moe.fp8._operations", operations),
        mock.patch(f"{package}.kernels.moe.common_rows._operations", operations),
        mock.patch(f"{package}.model.quantized_weights.quantize_weights", quantize_weights),
        mock.patch(f"{package}.model.moe_layer.experts_take_quantized_rows", lambda: takes_rows),
    ):
        yield operations
