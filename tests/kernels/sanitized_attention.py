"""Attention at small shapes, for compute-sanitizer to watch: each mask, width and order of sums."""

from __future__ import annotations

import torch

from megatron_kanana.kernels.attention import attention, documents_of

# sequence, batch, heads, key heads, width, value width, causal, documents, deterministic
CASES = [
    (200, 1, 2, 1, 192, 128, True, False, False),
    (130, 2, 2, 2, 192, 128, True, True, True),
    (257, 1, 1, 1, 192, 128, False, True, False),
    (257, 1, 1, 1, 128, 128, True, False, True),
    (96, 1, 1, 1, 64, 64, False, False, False),
    (40, 1, 500, 500, 64, 64, True, False, False),  # several tiles a block
]


def main() -> None:
    """Run forward and backward of each case."""
    torch.manual_seed(0)
    for length, batch, heads, key_heads, width, value_width, causal, documents, fixed in CASES:
        sizes = [(heads, width), (key_heads, width), (key_heads, value_width)]
        query, key, value = (
            torch.randn(length, batch, *size, device="cuda").bfloat16().requires_grad_()
            for size in sizes
        )
        segments = (torch.arange(length, device="cuda", dtype=torch.int32) // 50).repeat(batch, 1)
        segments[:, -7:] = -1
        maxima = torch.full((heads,), -torch.inf, device="cuda")
        out = attention(
            query,
            key,
            value,
            width**-0.5,
            backend="csrc",
            causal=causal,
            documents_2BS=documents_of(segments) if documents else None,
            max_logits_N=maxima,
            deterministic=fixed,
        )
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
        assert maxima.isfinite().all()


if __name__ == "__main__":
    main()
