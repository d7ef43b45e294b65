"""Matrices scaled to one Frobenius norm, padded, laid wide and rounded to fp16, in two passes.

Shape suffixes: B batch, M rows, C columns, N rows and K columns of the padded wide result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SUMMED_AT_ONCE = 8192  # elements
PARTS = 64  # partial sums of squares of a matrix
TILE_ROWS = 64
TILE_COLUMNS = 64


def normalize_matrices(
    x_BMC: torch.Tensor, norm: float, norm_factor: float, epsilon: float, multiple: int
) -> torch.Tensor:
    """norm * X / (norm_factor * ||X||_F + epsilon) for each matrix, in fp16.

    Args:
        x_BMC: contiguous, on CUDA, any float dtype; squares are summed in fp32.
        norm: factor on the result, a power of two to lose nothing.
        multiple: rows and columns are filled up with zeros to multiples of this.

    Returns:
        [B, N, K] with N <= K: transposed if the matrices are tall.
    """
    batch, rows, columns = x_BMC.shape
    tall = rows > columns
    partial_BP = torch.empty(batch, PARTS, dtype=torch.float32, device=x_BMC.device)
    _sum_squares[(PARTS, batch)](x_BMC, partial_BP, rows * columns, PARTS, SUMMED_AT_ONCE)
    size, width = (-(-length // multiple) * multiple for length in sorted((rows, columns)))
    out_BNK = torch.empty(batch, size, width, dtype=torch.float16, device=x_BMC.device)
    grid = (triton.cdiv(size, TILE_ROWS) * triton.cdiv(width, TILE_COLUMNS), batch)
    _scale[grid](
        x_BMC,
        partial_BP,
        out_BNK,
        rows,
        columns,
        size,
        width,
        norm,
        norm_factor,
        epsilon,
        PARTS,
        tall,
        TILE_ROWS,
        TILE_COLUMNS,
    )
    return out_BNK


@triton.jit
def _sum_squares(x, partial, elements, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    part, entry = tl.program_id(0), tl.program_id(1)
    x += entry.to(tl.int64) * elements
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(part * BLOCK, elements, PARTS * BLOCK):
        position = start + tl.arange(0, BLOCK)
        value = tl.load(x + position, mask=position < elements, other=0.0).to(tl.float32)
        sums += value * value
    tl.store(partial + entry * PARTS + part, tl.sum(sums))


@triton.jit
def _scale(
    x,
    partial,
    out,
    rows,
    columns,
    size,
    width,
    norm,
    norm_factor,
    epsilon,
    PARTS: tl.constexpr,
    TALL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    # From the end of the batch: the first pass left its last matrices in the L2 cache.
    entry = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    squares = tl.sum(tl.load(partial + entry * PARTS + tl.arange(0, PARTS)))
    factor = norm / (norm_factor * tl.sqrt(squares) + epsilon)
    across = tl.cdiv(width, TILE_COLUMNS)
    row = tl.program_id(0) // across * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = tl.program_id(0) % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    x += entry * rows * columns
    if TALL:
        position = column * columns + row
        inside = (column < rows) & (row < columns)
    else:
        position = row * columns + column
        inside = (row < rows) & (column < columns)
    value = tl.load(x + position, mask=inside, other=0.0).to(tl.float32) * factor
    position = entry * size * width + row * width + column
    tl.store(out + position, value.to(tl.float16), mask=(row < size) & (column < width))
