"""Rows of cross-entropy at small shapes, in bf16, fp32 and fp8, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from megatron_kanana.kernels.linear_cross_entropy import compiled

ROWS_AND_WORDS = [(1, 7), (5, 4103), (33, 128)]
FP8_ROWS_AND_WORDS = [(16, 16), (144, 272), (128, 1040)]


def main() -> None:
    """Run every operation of each case."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, words in ROWS_AND_WORDS:
            padded = torch.randn(rows, -(-words // 8) * 8, device="cuda").to(dtype)
            logits, labels, weights = padded[:, :words], *labels_and_weights(rows, words)
            statistics = compiled.statistics(logits, labels, 0)
            compiled.gradient_(logits, labels, 0, statistics, weights)
            torch.cuda.synchronize()
            assert logits.isfinite().all()
    for rows, words in FP8_ROWS_AND_WORDS:
        logits = torch.randn(rows, words, device="cuda").bfloat16()
        labels, weights = labels_and_weights(rows, words)
        statistics = compiled.statistics(logits, labels, 0)
        gradients = [
            torch.empty(shape, device="cuda", dtype=torch.float8_e5m2)
            for shape in ((rows, words), (words, rows))
        ]
        torch.ops.megatron_kanana.cross_entropy_gradient_fp8(
            logits, labels, 0, statistics, weights, *gradients
        )
        torch.cuda.synchronize()
        assert all(gradient.float().isfinite().all() for gradient in gradients)


def labels_and_weights(rows: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some labels are no word."""
    return torch.randint(words + 3, (rows,), device="cuda"), torch.rand(rows, device="cuda")


if __name__ == "__main__":
    main()
