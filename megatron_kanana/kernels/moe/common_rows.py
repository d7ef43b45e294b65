"""Rows that routed and shared experts in fp8 have in common, quantised once for both.

Where all experts lie on one process, both take the same hidden states; and as their outputs are
added up, both get the same gradient of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..native import has_operation_for, native_library_error

_operations = torch.ops.megatron_kanana


class QuantizedRows(NamedTuple):
    """Rows in e4m3.

    Attributes:
        data: e4m3 [rows, width].
        scales: fp32 [rows, width / 128], by which blocks of 128 numbers are multiplied.
    """

    data: torch.Tensor
    scales: torch.Tensor


Quantize = Callable[[torch.Tensor, bool], QuantizedRows]


def experts_take_quantized_rows() -> bool:
    """Whether the compiled operations quantise rows on their own, and take such rows."""
    return native_library_error() is None and has_operation_for("fp8_quantize_rows", "CUDA")


def quantize_rows(rows: torch.Tensor, whole: bool) -> QuantizedRows:
    """Rows as the experts in fp8 take them.

    Args:
        rows: bf16 [rows, width], contiguous; width is a multiple of 128.
        whole: whether a row has one scale, which then stands in every block of it.

    Raises:
        RuntimeError: rows are others, or this device has no such operation.
    """
    return QuantizedRows(*_operations.fp8_quantize_rows(rows, whole))


@dataclass(frozen=True)
class _Kept:
    """Rows quantised for the first of two; the rows themselves, so that no others take their place.

    Attributes:
        rows: [rows, width].
        version: of the rows when they were quantised; changes in place raise it.
        whole: whether a row has one scale.
        quantized: what came of it.
    """

    rows: torch.Tensor
    version: int
    whole: bool
    quantized: QuantizedRows

    def are_of(self, rows: torch.Tensor, whole: bool) -> bool:
        return (
            rows.data_ptr() == self.rows.data_ptr()
            and rows.shape == self.rows.shape
            and rows.stride() == self.rows.stride()
            and rows.dtype == self.rows.dtype
            and rows._version == self.rows._version == self.version
            and whole == self.whole
        )


class RowsForTwo:
    """Quantises rows for the first who asks, and keeps them until the second one does.

    If the second one asks for other rows, these are quantised, and nothing is kept just the same:
    what no one asks for would stay in memory until the pass and its graph are gone.

    Args:
        quantize: what does it.
    """

    def __init__(self, quantize: Quantize = quantize_rows) -> None:
        self._quantize = quantize
        self._kept: _Kept | None = None

    def take(self, rows: torch.Tensor, *, whole: bool) -> QuantizedRows:
        """Rows [rows, width] quantised, for one of the two."""
        if rows.is_inference():  # nothing tells of its changes in place
            return self._quantize(rows, whole)
        kept, self._kept = self._kept, None
        if kept is not None and kept.are_of(rows, whole):
            return kept.quantized
        quantized = self._quantize(rows, whole)
        if kept is None:
            self._kept = _Kept(rows.detach(), rows._version, whole, quantized)
        return quantized


class CommonRows:
    """What routed and shared experts have in common in one forward pass, and in its backward pass.

    Each forward pass has its own, which goes with its graph: passes of other microbatches come
    between, and activations that are recomputed have a forward pass of their own.

    Args:
        quantize: what quantises rows.
    """

    def __init__(self, quantize: Quantize = quantize_rows) -> None:
        self._inputs = RowsForTwo(quantize)
        self._hidden_states = RowsForTwo(quantize)
        self._grad_outs = RowsForTwo(quantize)

    def for_forward(self, hidden_states_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Data and scales of hidden states, bf16 [tokens, hidden size]."""
        return self._inputs.take(hidden_states_TD, whole=False)

    def for_backward(
        self, grad_out_TD: torch.Tensor, hidden_states_TD: torch.Tensor, *, weight_gradients: bool
    ) -> tuple[torch.Tensor, ...]:
        """Data and scales of the output's gradient; and of hidden states where they are needed.

        Args:
            grad_out_TD: bf16 [tokens, hidden size].
            hidden_states_TD: bf16 [tokens, hidden size].
            weight_gradients: whether the products of the weights' gradients are in fp8; they are
                sums over rows, so that a row has one scale.
        """
        grad_outs = self._grad_outs.take(grad_out_TD, whole=weight_gradients)
        if not weight_gradients:
            return grad_outs
        return *grad_outs, *self._hidden_states.take(hidden_states_TD, whole=True)
