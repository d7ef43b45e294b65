"""Attention on a CPU beside torch's: speed in interleaved rounds, and errors against float64.

python -m benchmarks.attention_cpu --name attention_cpu

Ours finds each head's largest logit as well, which torch's do not. Each is timed with tensors in
the layout it is made for: ours [sequence, batch, heads, width], torch's [batch, heads, sequence,
width]. All masks are causal there, all numbers fp32. Inputs of the errors: attention_cpu_errors.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_kanana.kernels.attention import attention
from megatron_kanana.kernels.native import load_native_operations

from .attention_cpu_errors import error_rows
from .card import RESULTS_DIR, Row, write_card
from .interleaved_cpu import rows_in_turns

OURS = "csrc"
MATH = "SDPA math"
FLASH = "SDPA flash"  # has no kernel for value widths other than the queries'
PEERS = {MATH: SDPBackend.MATH, FLASH: SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    batch: int
    length: int
    heads: int
    width: int
    value_width: int

    def __str__(self) -> str:
        sizes = f"{self.heads} heads, {self.width}/{self.value_width}"
        return f"B{self.batch} S{self.length}, {sizes}"


CASES = (
    Case(8, 128, 4, 48, 32),  # the tiny model's
    Case(2, 512, 8, 192, 128),
    Case(2, 1024, 8, 192, 128),
    Case(2, 2048, 8, 192, 128),
    Case(2, 1024, 8, 128, 128),
    Case(2, 1024, 8, 64, 64),
)

Tensors = list[torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def random_tensors(case: Case) -> Tensors:
    """Query, key, value and the output's gradient, [batch, heads, sequence, width]."""
    generator = torch.Generator().manual_seed(case.length)
    widths = (case.width, case.width, case.value_width, case.value_width)
    return [
        torch.randn(case.batch, case.heads, case.length, width, generator=generator)
        for width in widths
    ]


def ours(case: Case) -> Attention:
    """The compiled operation, with the largest logits."""
    max_logits = torch.full((case.heads,), -math.inf)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(
            query, key, value, case.width**-0.5, backend="csrc", max_logits_N=max_logits
        )

    return run


def of_torch(backend: SDPBackend) -> Attention:
    """One of the implementations of scaled_dot_product_attention."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return run


def contenders(case: Case) -> dict[str, tuple[Attention, Tensors]]:
    """What runs this case, with tensors in its layout that want gradients."""
    tensors = random_tensors(case)
    sequence_first = [tensor.permute(2, 0, 1, 3).contiguous() for tensor in tensors]
    found = {OURS: (ours(case), sequence_first)}
    for name, backend in PEERS.items():
        if name != FLASH or case.width == case.value_width:
            found[name] = (of_torch(backend), [tensor.clone() for tensor in tensors])
    for _, own in found.values():
        for tensor in own[:3]:
            tensor.requires_grad_()
    return found


def calls(function: Attention, tensors: Tensors) -> dict[str, Callable[[], object]]:
    """What is timed, by direction."""
    *inputs, grad_out = tensors

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def forward_and_backward() -> None:
        torch.autograd.grad(function(*inputs), inputs, grad_out)

    return {"forward": forward, "forward + backward": forward_and_backward}


def time_case(case: Case, rounds: int) -> list[Row]:
    """One row for each direction and peer."""
    by_name = {name: calls(*contender) for name, contender in contenders(case).items()}
    return rows_in_turns(str(case), OURS, by_name, rounds)


def main() -> None:
    """Measure, print and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--draws", type=int, default=16, help="random inputs of a case of errors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_native_operations()
    print(f"{torch.ops.megatron_kanana.cpu_instruction_set()}, {options.threads} threads")
    rows = [row for case in CASES for row in time_case(case, options.rounds)]
    errors, notes = error_rows(PEERS, options.draws)
    rows += errors
    for row in rows:
        ratio = "" if row.ratio is None else f", ratio {row.ratio:.2f}"
        print(f"{row.name}: {row.ours:.4g} {row.unit}, {row.peer} {row.peer_value:.4g}{ratio}")
    print("\n".join(notes))
    write_card(options.name, rows, options.results_dir, notes)


if __name__ == "__main__":
    main()
