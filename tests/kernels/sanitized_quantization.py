"""Quantisation in blocks, of dense layers' rows and of weights, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from megatron_kanana.kernels.fp8_blockwise import quantize_blocks
from megatron_kanana.kernels.moe.fp8 import quantize_weights
from megatron_kanana.kernels.native import load_native_operations

SHAPES = [(128, 128), (256, 640), (1152, 384)]
USAGES = [(True, True), (True, False), (False, True)]


def main() -> None:
    """Run every case."""
    load_native_operations()
    for shape in SHAPES:
        values = torch.randn(*shape, device="cuda").bfloat16()
        for rowwise, columnwise in USAGES:
            found = quantize_blocks(values, rowwise=rowwise, columnwise=columnwise)
            torch.cuda.synchronize()
            assert all(each.float().isfinite().all() for each in found)
        weights = quantize_weights(torch.stack([values, -values, 2 * values]))
        torch.cuda.synchronize()
        assert weights.data.float().isfinite().all()
        assert weights.scales_ERC.isfinite().all()


if __name__ == "__main__":
    main()
