"""Errors of attention and its peers against float64 on the same inputs; memory at great lengths.

python -m benchmarks.attention_accuracy --name attention_accuracy_h200
python -m benchmarks.attention_accuracy --memory --name attention_memory_h200

An error is of a whole tensor: root of the mean square, and largest, both over the root of the mean
square of the exact tensor (of max logits: largest over the largest exact one). Told are means over
`--draws` random inputs; what is larger than a peer's by more than chance, `error_draws.py` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .attention_exact import GRADIENTS, MAX_LOGITS, OUT, Results, exact
from .attention_peers import (
    CONTENDERS,
    FA4,
    FLEX,
    OURS,
    OURS_DETERMINISTIC,
    SDPA,
    TE,
    Case,
    Inputs,
    random_inputs,
)
from .card import Row, reason, write_card
from .error_draws import Errors, compared, summary

COMPARED = (OURS, OURS_DETERMINISTIC, FLEX, FA4, TE, SDPA)
LENGTHS = (1, 2, 7, 63, 64, 65, 127, 129, 191, 300, 512, 777, 1023, 1024, 1537, 2049, 4095, 8192)
MEMORY_CASES = (Case(32768, 1, 4, 4, 192, 128), Case(131072, 1, 4, 4, 192, 128))
ALLOWED_MEMORY = 1.02  # measured over stated, blocks of the allocator included

Change = Callable[[Case, Inputs], None]


def with_largest_logit(largest: float) -> Change:
    """Scales queries until the largest possible logit is this."""

    def change(case: Case, inputs: Inputs) -> None:
        norms = inputs.query.norm(dim=3).amax() * inputs.key.norm(dim=3).amax()
        inputs.query.mul_(largest / (norms * case.softmax_scale))

    return change


def with_rising_logits(rise: float) -> Change:
    """Logits that rise evenly along the keys, by this in all, or fall: each block of keys has a new
    maximum, a little above the one before, for who goes through them in this order."""

    def change(case: Case, inputs: Inputs) -> None:
        slope = torch.linspace(0, 1, case.length, device="cuda")[:, None, None]
        direction = torch.zeros(case.width, device="cuda")
        direction[0] = 1.0
        inputs.query.mul_(0.05).add_(direction)
        inputs.key.mul_(0.05).add_(
            (slope * rise / case.softmax_scale)[..., None].bfloat16() * direction
        )

    return change


def with_constant_rows(case: Case, inputs: Inputs) -> None:
    """Every key alike, so that all logits of a row are one number."""
    inputs.key.copy_(inputs.key[:1].expand_as(inputs.key))


def with_zeros(case: Case, inputs: Inputs) -> None:
    """Queries of zero: every visible key weighs the same."""
    inputs.query.zero_()


def random_documents(case: Case, longest: int, seed: int) -> Case:
    """The case with documents of 1 to `longest` tokens, other ones in each sample."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(case.batch):
        lengths: list[int] = []
        while (left := case.length - sum(lengths)) > 0:
            drawn = int(torch.randint(1, longest + 1, (1,), generator=generator))
            lengths.append(min(drawn, left))
        samples.append(tuple(lengths))
    return dataclasses.replace(case, documents=tuple(samples))


def sweep() -> Iterator[tuple[str, str, Case, Change | None]]:
    """Group, name, case, and what is done to its random inputs."""
    mla = Case(2048, 2, 8, 8, 192, 128)
    for length in LENGTHS:
        case = Case(length, 1 if length > 4096 else 2, 4, 4, 192, 128)
        yield "lengths", f"{length} tokens", case, None
    for batch, heads in ((1, 1), (1, 32), (5, 3), (8, 16)):
        case = Case(700, batch, heads, heads, 192, 128)
        yield "batch and heads", f"batch {batch}, {heads} heads", case, None
    for length in (333, 2048):
        name = f"{length} tokens, no mask"
        yield "masks", name, dataclasses.replace(mla, length=length, causal=False), None
    for longest in (20, 300, 2048):
        name = f"documents of at most {longest} tokens"
        yield "masks", name, random_documents(mla, longest, seed=longest), None
    ones = dataclasses.replace(mla, length=512, documents=((1,) * 512,) * 2)
    yield "masks", "documents of one token", ones, None
    for width in (64, 128):
        for length, key_heads in ((1000, 8), (2048, 2)):
            case = Case(length, 2, 8, key_heads, width, width)
            yield (
                "widths",
                f"{width}/{width}, {length} tokens, 8 over {key_heads} heads",
                case,
                None,
            )
    for largest in (0.01, 1.0, 30.0, 300.0, 1e3, 1e4):
        name = f"largest logit {largest:g}"
        yield "magnitudes", name, mla, with_largest_logit(largest)
    for rise in (3.0, 30.0, 300.0):
        name = f"logits that rise by {rise:g}"
        yield "rising logits", name, mla, with_rising_logits(rise)
        name = f"logits that fall by {rise:g}"
        yield "falling logits", name, mla, with_rising_logits(-rise)
    yield "constant rows", "equal keys", mla, with_constant_rows
    yield "constant rows", "zero queries", mla, with_zeros
    yield "scale", "a small scale, as YaRN's", dataclasses.replace(mla, scale=0.01), None


def results_of(name: str, case: Case, inputs: Inputs) -> Results:
    """What a contender computes."""
    contender = CONTENDERS[name]
    tensors = inputs.laid_out(batch_first=contender.batch_first)
    out, maxima = contender.build(case)(*tensors.leaves)
    gradients = torch.autograd.grad(out, tensors.leaves, tensors.grad_out)
    found = {OUT: out.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}
    if maxima is not None:
        found[MAX_LOGITS] = maxima.detach()
    return found


def errors(found: Results, right: Results) -> dict[str, float]:
    """By tensor and kind of error, as the head of this file defines them."""
    measured = {}
    for name, value in found.items():
        difference = value.double() - right[name]
        if name == MAX_LOGITS:
            measured[f"{name}, largest error"] = float(
                difference.abs().max() / right[name].abs().max().clamp_min(1e-30)
            )
            continue
        size = float(right[name].square().mean().sqrt())
        size = size if size > 1e-9 else 1.0  # a gradient of zero: its error is measured as it is
        measured[f"{name}, rms error"] = float(difference.square().mean().sqrt()) / size
        measured[f"{name}, largest error"] = float(difference.abs().max()) / size
    return measured


def compare(case: Case, change: Change | None, draws: int) -> tuple[list[Errors], list[str]]:
    """Errors of each draw by contender, and why others were not run."""
    measured: list[Errors] = []
    not_run: dict[str, str] = {}
    for draw in range(draws):
        inputs = random_inputs(case, seed=case.length + 10_000 * draw)
        if change is not None:
            with torch.no_grad():
                change(case, inputs)
        right = exact(case, inputs)
        measured.append({})
        for name in COMPARED:
            if name in not_run:
                continue
            try:
                measured[-1][name] = errors(results_of(name, case, inputs), right)
            except Exception as error:  # whatever a peer raises, the others are compared
                not_run[name] = f"{name}: {reason(error, 300)}"
    return measured, list(not_run.values())


def sweep_rows(draws: int, groups: Sequence[str]) -> tuple[list[Row], list[str]]:
    """A row a case and kind of error: ours beside the peer with the smallest one.

    Args:
        groups: of the sweep's cases; none for all.
    """
    results = []
    notes: dict[str, list[str]] = {}
    for group, name, case, change in sweep():
        if groups and group not in groups:
            continue
        measured, not_run = compare(case, change, draws)
        for why in not_run:
            notes.setdefault(why, []).append(name)
        for contender, first in measured[0].items():
            text = "  ".join(f"{value:9.3e}" for value in first.values())
            print(f"{group:16s} {name:40s} {contender:46s} {text}", flush=True)
        for ours, suffix in ((OURS, ""), (OURS_DETERMINISTIC, ", deterministic")):
            results += compared(f"{group}: {name}", measured, ours, suffix)
    told = summary(results)
    print("\n".join(told))
    return [result.row for result in results], told + [
        f"not run: {why} ({len(names)} cases, {names[0]} the first)" for why, names in notes.items()
    ]


def stated_bytes(case: Case) -> int:
    """Memory of forward and backward: query, key, value, output, their gradients, the logarithms
    of the sums, and the backward's workspace; query rows of the latter in tiles of 64."""
    queries = case.batch * case.query_heads * case.length
    keys = case.batch * case.key_heads * case.length
    widths = case.width + case.value_width
    tensors = 2 * (queries + keys) * widths
    padded = case.batch * case.query_heads * math.ceil(case.length / 64) * 64
    return 2 * tensors + 4 * queries + padded * 4 * (case.width + 2) + padded // 8


def memory_rows() -> list[Row]:
    """Peak memory beside the formula, and errors against float64 there too."""
    rows = []
    for case in MEMORY_CASES:
        for ours in (OURS, OURS_DETERMINISTIC):
            torch.cuda.empty_cache()
            inputs = random_inputs(case)
            given = sum(2 * tensor.numel() for tensor in (*inputs.leaves, inputs.grad_out))
            before = torch.cuda.memory_allocated() - given
            torch.cuda.reset_peak_memory_stats()
            found = results_of(ours, case, inputs)
            peak = torch.cuda.max_memory_allocated() - before
            stated = stated_bytes(case)
            name = f"{case.length} tokens, {case.query_heads} heads, forward and backward, {ours}"
            rows.append(Row(f"peak memory, {name}", "bytes", peak, "stated", stated, stated / peak))
            print(f"{name:70s} {peak / 2**20:10.1f} MiB, stated {stated / 2**20:10.1f} MiB")
            for kind, value in errors(found, exact(case, inputs)).items():
                rows.append(Row(f"{kind}, {name}", "relative", value))
                print(f"    {kind:40s} {value:.3e}", flush=True)
            assert peak <= stated * ALLOWED_MEMORY, f"{peak} bytes, stated {stated}"
            del inputs, found
    return rows


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="write benchmarks/results/NAME.json")
    parser.add_argument("--output", type=Path, help="folder of the card instead")
    parser.add_argument("--draws", type=int, default=16, help="random inputs of a case")
    parser.add_argument("--groups", nargs="*", default=[], help="of cases; without, all")
    parser.add_argument("--memory", action="store_true", help="memory at great lengths instead")
    arguments = parser.parse_args()
    rows, notes = (
        (memory_rows(), []) if arguments.memory else sweep_rows(arguments.draws, arguments.groups)
    )
    if arguments.name:
        folder = {"results_dir": arguments.output} if arguments.output else {}
        print(write_card(arguments.name, rows, notes=notes, **folder))


if __name__ == "__main__":
    main()
