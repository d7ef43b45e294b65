"""The output layer's products in fp8, by Transformer Engine, on Hopper.

Hidden states of a chunk and the weight are e4m3 with one scale each, of their present values; the
logits' gradient is e5m2, whose range holds what lies between a probability of 1 and one of 2e-9.
That range is known beforehand, so nobody looks for the largest gradient. A chunk's logits stay in
bf16. Sums are in fp32, of the logits' product in the tensor cores' own precision, as Transformer
Engine's recipe has it (`recipe.Float8CurrentScaling`).

Shape suffixes: those of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from megatron_kanana.native_library import HOPPER_FP8_OUTPUT_LAYER_UNIT

from ..native import has_operation_for, load_native_operations
from .products import ChunkLosses, HeadGradients
from .vocabulary import Vocabulary

_operations = torch.ops.megatron_kanana

GRADIENT_OF_ONE = 2.0**15
"""What the gradient of the largest weight's loss becomes where the probability is off by one: a
power of two with room below e5m2's largest number, 57,344."""
SMALLEST_WEIGHT = 1e-30
"""Stands for the largest weight of a chunk in which no loss counts."""
PIECES = 4
"""Of a chunk. The weight's gradient reads and writes sums of four bytes a weight, which pays where
many tokens are added at once; logits take most memory, and are there a piece at a time."""
PIECE_MULTIPLE = 128
"""Of which the tokens of a piece are multiples where there are as many: a product's tile has so."""


class Fp8Products:
    """`Products` in fp8 of bf16 tensors, in multiples of `HOPPER_FP8_OUTPUT_LAYER_UNIT`."""

    token_multiple: ClassVar[int] = PIECES * PIECE_MULTIPLE

    def __init__(
        self, vocabulary: Vocabulary, hidden_states_TD: torch.Tensor, weight_VD: torch.Tensor
    ) -> None:
        """Makes fp8 copies of the weight.

        Raises:
            RuntimeError: sizes are no such multiples, a tensor is not in bf16, or this device has
                no such operation.
        """
        load_native_operations("kernels.loss_backend")
        device, remedy = hidden_states_TD.device.type, "set precision.output_layer=bf16"
        if not has_operation_for("cross_entropy_gradient_fp8", device.upper()):
            raise RuntimeError(
                "precision.output_layer = fp8: the compiled operations have no losses in fp8 for"
                f" {device}; {remedy}"
            )
        unit = HOPPER_FP8_OUTPUT_LAYER_UNIT
        for name, tensor in (("hidden states", hidden_states_TD), ("weight", weight_VD)):
            is_divided = all(size % unit == 0 for size in tensor.shape)
            if not is_divided or tensor.dtype != torch.bfloat16:
                raise RuntimeError(
                    f"precision.output_layer = fp8: {name} must be bfloat16 in multiples of"
                    f" {unit}, got {tensor.dtype} {tuple(tensor.shape)}; {remedy}"
                )
        self._vocabulary = vocabulary
        self._hidden_states_TD = hidden_states_TD
        self._weight_VD = weight_VD
        self._quantized_weight = _quantize(weight_VD)

    @property
    def bytes_per_token(self) -> int:
        """The gradient by words, and of a piece logits and gradient by tokens."""
        words, of_piece = self._weight_VD.shape[0], self._weight_VD.itemsize + 1
        return words + words * of_piece // PIECES

    def logits(self, chunk: slice) -> torch.Tensor:
        """As `Products.logits`, in bf16."""
        hidden_states_CD = self._hidden_states_TD[chunk]
        if len(hidden_states_CD) == 0:
            return hidden_states_CD.new_empty(0, self._weight_VD.shape[0])
        return self._logits(_quantize(hidden_states_CD), slice(0, len(hidden_states_CD)))

    def _logits(self, quantized_CD: Any, part: slice) -> torch.Tensor:
        """Of a part of a chunk, whose hidden states have one scale."""
        whole = quantized_CD.get_metadata()
        rows_PD = _with_scale(whole["fp8_scale_inv"], torch.float8_e4m3fn, whole["data"][part])
        words = self._weight_VD.shape[0]
        logits_PV = self._weight_VD.new_empty(part.stop - part.start, words)
        _multiply(self._quantized_weight, rows_PD, "TN", logits_PV, promotes_sums=False)
        return logits_PV

    def add_gradients(
        self, losses: ChunkLosses, to: HeadGradients, *, to_what_is_there: bool = True
    ) -> torch.Tensor:
        """As `Products.add_gradients`."""
        hidden_states_CD = self._hidden_states_TD[losses.tokens]
        tokens, words = hidden_states_CD.shape[0], self._weight_VD.shape[0]
        if tokens == 0:
            if to.weight_VD is not None and not to_what_is_there:
                to.weight_VD.zero_()
            return losses.weights_C.new_empty(3, 0)
        largest = losses.weights_C.abs().amax().clamp_min(SMALLEST_WEIGHT)
        weights_C = losses.weights_C * (GRADIENT_OF_ONE / largest)
        scale = largest / GRADIENT_OF_ONE
        quantized_CD = _quantize(hidden_states_CD)
        by_word_VC = hidden_states_CD.new_empty(words, tokens, dtype=torch.float8_e5m2)
        parts = []
        for piece in _pieces(tokens):
            labels_P = losses.labels_C[piece]
            if losses.logits_CV is None:
                logits_PV = self._logits(quantized_CD, piece)
            else:
                logits_PV = losses.logits_CV[piece]
            if losses.statistics_3C is None:
                parts.append(self._vocabulary.statistics(logits_PV, self._weight_VD, labels_P))
            else:
                parts.append(losses.statistics_3C[:, piece])
            by_token_PV = torch.empty_like(logits_PV, dtype=torch.float8_e5m2)
            _operations.cross_entropy_gradient_fp8(
                logits_PV,
                labels_P,
                self._vocabulary.first_word(self._weight_VD),
                parts[-1].contiguous(),
                weights_C[piece],
                by_token_PV,
                by_word_VC[:, piece],
            )
            del logits_PV  # before the next piece's are there
            if to.hidden_states_TD is not None:
                gradient_PV = _with_scale(scale, torch.float8_e5m2, by_token_PV)
                out_PD = to.hidden_states_TD[losses.tokens][piece]
                _multiply(self._quantized_weight, gradient_PV, "NN", out_PD)
                del gradient_PV
            del by_token_PV
        if to.weight_VD is not None:
            gradient_CV = _with_scale(scale, torch.float8_e5m2, None, by_word_VC)
            _multiply(quantized_CD, gradient_CV, "NT", to.weight_VD, accumulate=to_what_is_there)
        return torch.cat(parts, dim=1)


def _pieces(tokens: int) -> Iterator[slice]:
    """At most `PIECES` slices of a chunk."""
    size = -(-tokens // (PIECES * PIECE_MULTIPLE)) * PIECE_MULTIPLE
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))


def _quantize(values: torch.Tensor) -> Any:
    """In e4m3, in the order of the rows and in that of the columns."""
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer
    from transformer_engine.pytorch.constants import TE_DType

    quantizer = Float8CurrentScalingQuantizer(TE_DType[torch.float8_e4m3fn], values.device)
    return quantizer(values.detach())


def _with_scale(
    scale: torch.Tensor,
    dtype: torch.dtype,
    data: torch.Tensor | None,
    transposed: torch.Tensor | None = None,
) -> Any:
    """Numbers of 8 bits, in either order, as Transformer Engine has them."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor import Float8TensorStorage

    return Float8TensorStorage(
        data=None if data is None else data.view(torch.uint8),
        data_transpose=None if transposed is None else transposed.view(torch.uint8),
        fp8_scale_inv=scale.view(1),
        fp8_dtype=TE_DType[dtype],
    )


def _multiply(
    a: Any,
    b: Any,
    layout: str,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    promotes_sums: bool = True,
) -> None:
    """A product of linear layers in Transformer Engine's words: out = b a^T (TN), b a (NN) or
    b^T a (NT), or what was there and that.

    `promotes_sums`: whether tensor cores hand their sums on, as their own have fewer bits than
    fp32 has; needed where thousands of numbers are added.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        a,
        b,
        out_dtype=out.dtype,
        layout=layout,
        out=out,
        accumulate=accumulate,
        use_split_accumulator=promotes_sums,
    )
