"""Batched fp16 products on Hopper GPUs whose results or operands are symmetric matrices.

A symmetric matrix is stored as the tiles of 128 x 128 on and below its diagonal; the others are
never written, and read from their mirror images. So `symmetric_matmul` computes and moves half, and
`matmul` multiplies such a matrix with an ordinary one. The kernels are in symmetric_tiles.py.

Shape suffixes: B batch, N rows and columns of a symmetric matrix, K contracted, C columns.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .symmetric_tiles import DEPTH, TILE, matmul_kernel, symmetric_matmul_kernel

STAGES = 5  # pairs of operand tiles in flight: with two 16-bit output tiles they fill shared memory
STAGES_FP32 = 3  # the same with two fp32 output tiles


def symmetric_matmul(
    a_BNK: torch.Tensor,
    b_BNK: torch.Tensor,
    *,
    operands_are_symmetric: bool,
    alpha: float = 1.0,
    addend_BNN: torch.Tensor | None = None,
    beta: float = 0.0,
    identity: float = 0.0,
    last_first: bool = False,
) -> torch.Tensor:
    """alpha * A B^T + beta * C + identity * I, where the sum is known to be symmetric.

    Accumulated in fp32.

    Args:
        a_BNK, b_BNK: contiguous fp16; N a multiple of 128, K of 64.
        operands_are_symmetric: A and B are symmetric and stored as such.
        addend_BNN: C, symmetric and stored as such.
        last_first: work through the batch from its end. A kernel that starts where the one before
            it stopped finds operands in the L2 cache.

    Returns:
        [B, N, N] fp16, of which the tiles above the diagonal are not written.
    """
    batch, size, depth = a_BNK.shape
    out_BNN = torch.empty(batch, size, size, dtype=a_BNK.dtype, device=a_BNK.device)
    side = size // TILE.value
    tiles = side * (side + 1) // 2
    out = _view(out_BNN)
    arguments = (
        _view(a_BNK),
        _view(a_BNK),
        _view(b_BNK),
        _view(b_BNK),
        out if addend_BNN is None else _view(addend_BNN),
        out,
        batch * tiles,
        tiles,
        size,
        depth // DEPTH.value,
        int(last_first),
        alpha,
        beta,
        identity,
        operands_are_symmetric,
        addend_BNN is not None,
        identity != 0,
        STAGES,
    )
    kernel = _compiled_symmetric_matmul(a_BNK.device, *arguments[-4:])
    kernel[_grid(a_BNK.device, batch * tiles)](*arguments)
    return out_BNN


def matmul(
    a_BNN: torch.Tensor,
    b_BNC: torch.Tensor,
    *,
    alpha: float = 1.0,
    out_dtype: torch.dtype = torch.float16,
    transpose_out: bool = False,
    last_first: bool = False,
) -> torch.Tensor:
    """alpha * A B with a symmetric A, accumulated in fp32.

    Args:
        a_BNN: fp16, symmetric and stored as such; N a multiple of 128.
        b_BNC: contiguous fp16; C a multiple of 128.
        out_dtype: fp16, bf16 or fp32.
        transpose_out: store each product transposed.
        last_first: work through the batch from its end.

    Returns:
        [B, N, C], or [B, C, N] with `transpose_out`.
    """
    batch, size, columns = b_BNC.shape
    out = torch.empty(
        (batch, columns, size) if transpose_out else (batch, size, columns),
        dtype=out_dtype,
        device=a_BNN.device,
    )
    tiles = (size // TILE.value) * (columns // TILE.value)
    arguments = (
        _view(a_BNN),
        _view(a_BNN),
        _view(b_BNC),
        _view(out),
        batch * tiles,
        size // TILE.value,
        columns // TILE.value,
        int(last_first),
        alpha,
        transpose_out,
        STAGES_FP32 if out_dtype == torch.float32 else STAGES,
    )
    kernel = _compiled_matmul(a_BNN.device, out_dtype, *arguments[-2:])
    kernel[_grid(a_BNN.device, batch * tiles)](*arguments)
    return out


class _View(NamedTuple):
    """What a launch needs to know of a batch of matrices, one below the other."""

    base: torch.Tensor
    shape: tuple[int, int]
    strides: tuple[int, int]
    padding: str = "zero"


def _view(tensor: torch.Tensor) -> _View:
    batch, rows, columns = tensor.shape
    return _View(tensor, (batch * rows, columns), (columns, 1))


def _descriptor(dtype: torch.dtype, device: torch.device, rows: int, columns: int) -> Any:
    """Stands for any matrix that is read or written in blocks of this shape."""
    block = [rows, columns]
    element = {torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}
    layout = NVMMASharedLayout.get_default_for(block, element[dtype])
    example = torch.empty(rows, columns, dtype=dtype, device=device)
    return TensorDescriptor(example, block, [columns, 1], block, layout)


# Compiled once and launched through the compiled kernel: what the just-in-time compiler does at
# every launch to find it again takes longer than the products of a small matrix.
@functools.cache
def _compiled_symmetric_matmul(device: torch.device, *constants: Any) -> Any:
    rows = _descriptor(torch.float16, device, TILE.value, DEPTH.value)
    columns = _descriptor(torch.float16, device, DEPTH.value, TILE.value)
    tile = _descriptor(torch.float16, device, TILE.value, TILE.value)
    descriptors = (rows, columns, rows, columns, tile, tile)
    numbers = (1, 1, 1, 1, 0, 1.0, 0.0, 0.0)
    return symmetric_matmul_kernel.warmup(
        *descriptors, *numbers, *constants, grid=(1,), num_warps=4
    )


@functools.cache
def _compiled_matmul(device: torch.device, out_dtype: torch.dtype, *constants: Any) -> Any:
    rows = _descriptor(torch.float16, device, TILE.value, DEPTH.value)
    columns = _descriptor(torch.float16, device, DEPTH.value, TILE.value)
    tile = _descriptor(out_dtype, device, TILE.value, TILE.value)
    numbers = (1, 1, 1, 0, 1.0)
    return matmul_kernel.warmup(
        rows, columns, columns, tile, *numbers, *constants, grid=(1,), num_warps=4
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grid(device: torch.device, tiles: int) -> tuple[int, int, int]:
    return (min(_processors(device), tiles), 1, 1)
