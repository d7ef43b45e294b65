"""Where the compiled operations of csrc/ lie, and what they are compiled for."""

from __future__ import annotations

from pathlib import Path

NATIVE_LIBRARY = Path(__file__).resolve().parent / "_native.so"
"""Built by `pip install` or `make`."""

HOPPER_ATTENTION_WIDTHS = ((192, 128), (128, 128), (64, 64))
"""Widths of query and key, and of value, that the CUDA kernels of attention have; bf16 only."""

HOPPER_EXPERT_WIDTH_UNIT = 64
"""The CUDA kernels of experts take hidden sizes and widths that are multiples of it; bf16 only."""
