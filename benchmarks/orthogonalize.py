"""Orthogonalisation beside its peers: speed and accuracy on a GPU, accuracy against SVD on a CPU.

python -m benchmarks.orthogonalize --name orthogonalize_h200
python -m benchmarks.orthogonalize --table
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_kanana.optimizer.orthogonalize import (
    POLAR_EXPRESS_SAFETY,
    newton_schulz,
    polar_express,
    polar_express_coefficients,
)

from .card import Row, write_card

STEPS = 5
ROUNDS = 31
WARM_UP = 3
Orthogonalize = Callable[[torch.Tensor], torch.Tensor]

# kanana_2_30b_a3b, kanana_2_155b_a17b and a square one: batch, rows, columns
SHAPES = {
    "30B experts' gate or up": (128, 768, 2048),
    "30B experts' down": (128, 2048, 768),
    "155B experts' gate or up, 8 of them": (8, 1536, 4096),
    "155B attention output or square": (1, 4096, 4096),
    "30B dense down": (1, 2048, 6144),
    "30B queries": (1, 6144, 2048),
    "30B attention output": (1, 2048, 4096),
    "30B attention output of 8 layers": (8, 2048, 4096),
    "30B shared experts' gate or up of 8 layers": (8, 1536, 2048),
    "30B latent of 8 layers": (8, 512, 2048),
    "30B latent": (1, 512, 2048),
}


def plain(x: torch.Tensor) -> torch.Tensor:
    """Polar Express as its authors publish it, batched, in bf16."""
    wide = normalized(x)
    for a, b, c in polar_express_coefficients(STEPS):
        gram = torch.bmm(wide, wide.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return oriented(wide, x)


def plain_on_diagonal(x: torch.Tensor) -> torch.Tensor:
    """The same with a X as a on the polynomial's diagonal, which saves baddbmm's copy of X."""
    wide = normalized(x)
    for a, b, c in polar_express_coefficients(STEPS):
        gram = torch.bmm(wide, wide.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        wide = torch.bmm(polynomial, wide)
    return oriented(wide, x)


def quack_symmetric(x: torch.Tensor) -> torch.Tensor:
    """The same with quack's symmetric products and fused addition."""
    from quack.gemm_interface import gemm_add, gemm_symmetric

    wide = normalized(x)
    for a, b, c in polar_express_coefficients(STEPS):
        gram = gemm_symmetric(wide, wide.mT)
        polynomial = gemm_symmetric(gram, gram, C=gram, alpha=c, beta=b)
        wide = gemm_add(polynomial, wide, C=wide, beta=a, tuned=False)
    return oriented(wide, x)


@functools.cache
def _quack_gram(compiled: bool) -> Orthogonalize:
    from gram_newton_schulz import GramNewtonSchulz

    return GramNewtonSchulz(  # type: ignore[no-any-return]
        ns_coefficients=[list(row) for row in polar_express_coefficients(STEPS)],
        gram_newton_schulz_reset_iterations=[2],
        compile_kwargs={"fullgraph": True} if compiled else None,
    )


def quack_gram(x: torch.Tensor) -> torch.Tensor:
    """Gram Newton-Schulz, of its authors' package on quack, one restart, with our coefficients."""
    return _quack_gram(False)(x)


def quack_gram_compiled(x: torch.Tensor) -> torch.Tensor:
    """The same under torch.compile, its default."""
    return _quack_gram(True)(x)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Wide, in bf16, divided by the norm as published."""
    wide = (x.mT if x.shape[1] > x.shape[2] else x).bfloat16()
    norm = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True)
    result: torch.Tensor = wide / (norm * POLAR_EXPRESS_SAFETY + 1e-7)
    return result


def oriented(wide: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Back to the orientation and dtype of `x`."""
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(x.dtype)


def peers() -> dict[str, Orthogonalize]:
    """What can run here, by name."""
    found: dict[str, Orthogonalize] = {
        "torch.baddbmm, bf16": plain,
        "torch.bmm, a on the diagonal, bf16": plain_on_diagonal,
    }
    try:
        version = importlib.metadata.version("quack-kernels")
        found[f"quack {version} gemm_symmetric, bf16"] = quack_symmetric
        gram = importlib.metadata.version("gram-newton-schulz")
        found[f"gram-newton-schulz {gram} on quack {version}, fp16"] = quack_gram
        found[f"gram-newton-schulz {gram} on quack {version}, compiled"] = quack_gram_compiled
    except importlib.metadata.PackageNotFoundError as error:
        print(f"not run: {error}")
    return found


def interleaved_ms(functions: dict[str, Orthogonalize], x: torch.Tensor) -> dict[str, float]:
    """Median milliseconds of each, all of them once a round."""
    for function in functions.values():
        for _ in range(WARM_UP):
            function(x)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function(x)
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(values) for name, values in times.items()}


def speed_rows() -> list[Row]:
    """Each shape beside each peer."""
    rows = []
    for label, (batch, height, width) in SHAPES.items():
        x = torch.randn(batch, height, width, device="cuda").bfloat16()
        functions: dict[str, Orthogonalize] = {
            "ours": functools.partial(polar_express, steps=STEPS),
            **peers(),
        }
        times = interleaved_ms(functions, x)
        ours = times.pop("ours")
        name = f"Polar Express, {STEPS} steps, {batch} x ({height}x{width}): {label}"
        for peer, value in times.items():
            rows.append(Row(name, "ms", ours, peer, value, value / ours, ROUNDS))
            print(f"{name:90s} {ours:8.4f} {value:8.4f} {value / ours:6.2f}  {peer}", flush=True)
    return rows


def with_spectrum(values: torch.Tensor, width: int, device: str) -> torch.Tensor:
    """A random float64 matrix with these singular values, [len(values), width]."""
    generator = torch.Generator().manual_seed(1)
    size = len(values)
    left, right = (
        torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64)).Q
        for rows in (size, width)
    )
    result: torch.Tensor = (left * values) @ right.T
    return result.to(device)


def spectra(size: int, width: int) -> dict[str, torch.Tensor]:
    """Matrices of the kinds that momentum can be, [size, width] float64 on the GPU."""
    generator = torch.Generator().manual_seed(2)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rank = size // 16
    low_rank = gaussian(size, rank) @ gaussian(rank, width) / math.sqrt(rank)
    outlier = torch.full((size,), 0.03, dtype=torch.float64)
    outlier[0] = 1.0
    half = torch.ones(size, dtype=torch.float64)
    half[size // 2 :] = 1e-3
    logarithmic = {
        f"singular values 1 to {end:g}": torch.logspace(0, math.log10(end), size).double()
        for end in (1e-2, 1e-3, 1e-4)
    }
    return {
        "Gaussian": gaussian(size, width).cuda(),
        f"rank {rank} + 1 % noise": (low_rank + 1e-2 * gaussian(size, width)).cuda(),
        **{name: with_spectrum(values, width, "cuda") for name, values in logarithmic.items()},
        "half 1, half 1e-3": with_spectrum(half, width, "cuda"),
        "one 1, others 0.03": with_spectrum(outlier, width, "cuda"),
    }


def accuracy_rows() -> list[Row]:
    """Distances to float64's iteration and to the polar factor, and the largest singular value."""
    rows = []
    ours = functools.partial(polar_express, steps=STEPS)
    for kind, exact_x in spectra(768, 2048).items():
        x = exact_x.float()[None]
        iteration = polar_express(x.double(), STEPS)
        left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
        targets = {"float64's iteration": iteration, "the polar factor": left @ right}
        results = {"ours": ours(x), **{name: function(x) for name, function in peers().items()}}
        for target_name, target in targets.items():
            distances = {
                name: ((value.double() - target).norm() / target.norm()).item()
                for name, value in results.items()
            }
            best = distances.pop("ours")
            name = f"relative distance to {target_name}, 768x2048, {kind}"
            for peer, value in distances.items():
                rows.append(Row(name, "relative", best, peer, value, value / best))
        largest = {
            name: torch.linalg.matrix_norm(value.double(), ord=2).item()
            for name, value in {**results, "exact": iteration}.items()
        }
        best = largest.pop("ours")
        for peer, value in largest.items():
            name = f"largest singular value of the result, 768x2048, {kind}"
            rows.append(Row(name, "value", best, peer, value))
    for row in rows:
        print(f"{row.name:84s} {row.ours:8.4f} {row.peer_value:8.4f}  {row.peer}")
    return rows


def print_table() -> None:
    """Both methods against SVD in float64, for spectra from 1 down to the inverse condition."""
    print("| condition | steps | NS: largest | NS: distance | PE: largest | PE: distance |")
    print("| --- | --- | --- | --- | --- | --- |")
    for condition in (1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6):
        values = torch.logspace(0, -math.log10(condition), 64).double()
        x = with_spectrum(values, 128, "cpu")
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        polar = left @ right
        for steps in (5, 7, 10):
            cells = []
            for method in (newton_schulz, polar_express):
                result = method(x, steps)
                error = (torch.linalg.svdvals(result) - 1).abs().max().item()
                distance = ((result - polar).norm() / polar.norm()).item()
                cells += [f"{error:.3g}", f"{distance:.3g}"]
            print(f"| {condition:.0e} | {steps} | {' | '.join(cells)} |")


def main() -> None:
    """Write the card, or print the table of docs/optimizer.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--name", help="name of the card")
    what.add_argument("--table", action="store_true", help="accuracy against SVD, on a CPU")
    parser.add_argument("--results-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.table:
        print_table()
        return
    print(write_card(options.name, accuracy_rows() + speed_rows(), options.results_dir))


if __name__ == "__main__":
    main()
