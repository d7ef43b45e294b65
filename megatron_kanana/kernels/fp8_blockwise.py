"""Quantisation to 8 bits in blocks of 128, for Transformer Engine's layers on Hopper GPUs.

Transformer Engine's own has the same bits, and on an H200 moves 2 TB/s of 4.8.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from .native import has_operation_for, hopper_error, native_library_error

_operations = torch.ops.megatron_kanana
_UNIT = 128  # rows and columns that the kernel takes are multiples of it
_ARGUMENTS = {
    *("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"),
    *("fp8_dtype", "quantizer", "is_2D_scaled", "data_format"),
}

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_blocks(
    values: torch.Tensor, *, rowwise: bool = True, columnwise: bool = True
) -> Blocks:
    """Numbers of 8 bits (e4m3), rounded to nearest, in blocks of 128 with a scale each.

    The scale is the largest power of two with which no number of the block is beyond the format.

    Args:
        values: bf16 [..., columns], contiguous, on a Hopper GPU; columns, and the others' product,
            are multiples of 128.
        rowwise: whether the first two results are wanted, of blocks along a row.
        columnwise: whether the last two results are wanted, of blocks along a column.

    Returns:
        uint8 of the values' shape, fp32 [columns / 128, rows], by which they are multiplied, uint8
        with the last dimension first, and fp32 [rows / 128, columns]. What is not wanted is empty.

    Raises:
        RuntimeError: values are others.
    """
    found: Blocks = _operations.fp8_quantize_blocks(values, rowwise, columnwise)
    return found


def blockwise_error() -> str | None:
    """Why Transformer Engine's quantiser is not replaced on this device; None if it can be."""
    if (error := native_library_error() or hopper_error()) is not None:
        return error
    if not has_operation_for("fp8_quantize_blocks", "CUDA"):
        return "the compiled operations have no quantisation of blocks (build them again)"
    try:
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
            Float8BlockwiseQTensorStorage,
        )
    except ImportError:
        return "another Transformer Engine than 2.11"
    parameters = inspect.signature(Float8BlockwiseQTensorStorage.__new__).parameters.values()
    named = {each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    if named - {"cls"} != _ARGUMENTS:
        return "another Transformer Engine than 2.11"
    return None


def quantize_by_csrc(layer: Any) -> None:
    """Have a layer of Transformer Engine's quantise inputs and gradients by `quantize_blocks`.

    Its quantisers are made when it first computes in fp8; what the kernel does not take is left to
    them.
    """
    make_quantizers = layer.set_meta_tensor

    def set_meta_tensor(fwd: bool, recipe: Any) -> None:
        make_quantizers(fwd, recipe)
        for quantizer in layer.quantizers["scaling_fwd" if fwd else "scaling_bwd"]:
            if hasattr(quantizer, "block_len") and "quantize_impl" not in vars(quantizer):
                quantizer.quantize_impl = quantizing_by_csrc(quantizer)

    layer.set_meta_tensor = set_meta_tensor


def quantizing_by_csrc(quantizer: Any) -> Callable[[torch.Tensor], Any]:
    """A Float8BlockQuantizer's `quantize_impl`; its own is for what the kernel does not take."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
        Float8BlockScaleTensorFormat,
        Float8BlockwiseQTensor,
        TE_DType,
    )
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )

    e4m3, gemm_ready = TE_DType.kFloat8E4M3, Float8BlockScaleTensorFormat.GEMM_READY
    others = quantizer.quantize_impl

    def quantize_impl(tensor: torch.Tensor) -> Any:
        rowwise, columnwise = quantizer.rowwise_usage, quantizer.columnwise_usage
        taken = quantizer.dtype == e4m3 and _is_of_lines(quantizer) and _is_taken(tensor)
        if not (taken and (rowwise or columnwise)):
            return others(tensor)
        data, scale_inv, transposed, transposed_scale_inv = quantize_blocks(
            tensor.detach() if tensor.requires_grad else tensor,
            rowwise=rowwise,
            columnwise=columnwise,
        )
        found = {
            "rowwise_data": data if rowwise else None,
            "rowwise_scale_inv": scale_inv if rowwise else None,
            "columnwise_data": transposed if columnwise else None,
            "columnwise_scale_inv": transposed_scale_inv if columnwise else None,
            "fp8_dtype": quantizer.dtype,
            "quantizer": quantizer,
            "is_2D_scaled": False,
            "data_format": gemm_ready,
        }
        if quantizer.internal:
            return Float8BlockwiseQTensorStorage(**found)
        return Float8BlockwiseQTensor(shape=tensor.shape, dtype=tensor.dtype, **found)

    return quantize_impl


def _is_of_lines(quantizer: Any) -> bool:
    """Whether blocks are parts of lines, laid out for products, with powers of two as scales."""
    return (
        quantizer.block_scaling_dim == 1
        and quantizer.block_len == _UNIT
        and quantizer.force_pow_2_scales
        and not quantizer.all_gather_usage
        and not quantizer.amax_epsilon
    )


def _is_taken(tensor: torch.Tensor) -> bool:
    if not (
        _is_on_gpu(tensor)
        and tensor.dtype is torch.bfloat16
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dim() >= 2
        and tensor.is_contiguous()
        and tensor.data_ptr() % 16 == 0
    ):
        return False
    *others, columns = tensor.shape
    rows = math.prod(others)
    return rows > 0 and columns > 0 and columns % _UNIT == 0 and rows % _UNIT == 0


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
