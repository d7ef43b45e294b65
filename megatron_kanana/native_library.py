"""Where the compiled operations of csrc/ lie, and what they are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NATIVE_LIBRARY = Path(__file__).resolve().parent / "_native.so"
"""Built by `pip install` or `make`."""

HOPPER_ATTENTION_WIDTHS = ((192, 128), (128, 128), (64, 64))
"""Widths of query and key, and of value, that the CUDA kernels of attention have; bf16 only."""

HOPPER_EXPERT_WIDTH_UNIT = 64
"""The CUDA kernels of experts take hidden sizes and widths that are multiples of it; bf16 only."""

HOPPER_FP8_EXPERT_WIDTH_UNIT = 128
"""The same in fp8, where blocks of as many numbers have a scale (csrc/kernels/fp8_experts.h)."""

HOPPER_FP8_OUTPUT_LAYER_UNIT = 16
"""With products in fp8 the output layer takes tokens, words of a process and hidden sizes that are
multiples of it (csrc/kernels/cross_entropy.h, and Transformer Engine's products)."""

HOPPER_MAX_EXPERTS = 512
HOPPER_MAX_EXPERTS_OF_A_TOKEN = 32
HOPPER_MAX_EXPERT_GROUPS = 32
"""The CUDA kernels of routing take as many (csrc/kernels/moe.h)."""

HOPPER_NORM_WIDTH_UNIT, HOPPER_MAX_NORM_WIDTH = 8, 16384
"""The CUDA kernels of norms and of the embedding's gradient take multiples of the first, up to the
second (csrc/kernels/rms_norm.h); bf16 only."""


def hopper_has_expert_widths(hidden_size: int, width: int) -> bool:
    """Whether the CUDA kernels of experts take a hidden size and a width of an expert."""
    return not (hidden_size % HOPPER_EXPERT_WIDTH_UNIT or width % HOPPER_EXPERT_WIDTH_UNIT)


@dataclass(frozen=True)
class ExpertLayerSizes:
    """What decides whether the CUDA kernels of experts have a layer.

    Attributes:
        hidden_size: width of the residual stream.
        width: of an expert, of its part on a process under expert tensor parallelism.
        shared_width: of the shared experts together, of a process's part; 0 without them.
        num_experts: of all processes.
        num_experts_per_token: that each token visits.
        num_groups: that the experts are dealt into.
    """

    hidden_size: int
    width: int
    shared_width: int
    num_experts: int
    num_experts_per_token: int
    num_groups: int

    def hopper_limits_passed(self) -> Iterator[str]:
        """What the CUDA kernels do not take, in words."""
        if not hopper_has_expert_widths(self.hidden_size, self.width):
            yield (
                f"multiples of {HOPPER_EXPERT_WIDTH_UNIT}, not a hidden size of {self.hidden_size} "
                f"and experts {self.width} wide"
            )
        for number, limit, what in (
            (self.num_experts, HOPPER_MAX_EXPERTS, "experts"),
            (self.num_experts_per_token, HOPPER_MAX_EXPERTS_OF_A_TOKEN, "experts a token"),
            (self.num_groups, HOPPER_MAX_EXPERT_GROUPS, "groups of experts"),
        ):
            if number > limit:
                yield f"at most {limit} {what}, not {number}"

    def hopper_fp8_limits_passed(self) -> Iterator[str]:
        """What the CUDA kernels of experts in fp8 do not take, in words."""
        unit = HOPPER_FP8_EXPERT_WIDTH_UNIT
        if self.hidden_size % unit or self.width % unit or self.shared_width % unit:
            yield (
                f"multiples of {unit} in fp8, not a hidden size of {self.hidden_size}, experts "
                f"{self.width} wide and shared experts {self.shared_width} wide"
            )
