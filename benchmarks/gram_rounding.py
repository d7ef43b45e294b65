"""What fp16's rounding does to Gram iterations, by how many steps share one X X^T, on a CPU.

Every product is of fp16 operands with fp32 sums, rounded to fp16; of symmetric results the lower
triangle is computed and mirrored, as on a GPU.

python -m benchmarks.gram_rounding
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_kanana.optimizer.gram_iteration import SCALE
from megatron_kanana.optimizer.orthogonalize import (
    POLAR_EXPRESS_SAFETY,
    polar_express,
    polar_express_coefficients,
)

STEPS = 5
SIZE, WIDTH = 96, 192
Form = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Print a line for each form: errors over spectra of every kind, beside plain bf16."""
    forms: dict[str, Form] = {
        "plain bf16": plain_bf16,
        "1, 1, 1, 1, 1": lambda x: on_gram(x, [1] * STEPS),
        "2, 2, 1": lambda x: on_gram(x, [2, 2, 1]),
        "2, 2, 1, new factor right": lambda x: on_gram(x, [2, 2, 1], new_factor_left=False),
        "2, 3": lambda x: on_gram(x, [2, 3]),
        "3, 2": lambda x: on_gram(x, [3, 2]),
        "5": lambda x: on_gram(x, [5]),
    }
    errors: dict[str, list[float]] = {name: [] for name in forms}
    largest: dict[str, list[float]] = {name: [] for name in forms}
    for x in matrices():
        exact = polar_express(x, STEPS)
        for name, form in forms.items():
            result = form(x).double()
            errors[name].append(float((result - exact).norm() / exact.norm()))
            largest[name].append(float(torch.linalg.matrix_norm(result, ord=2)))
    print("| steps on one X X^T | median error | worst error | worst / bf16's | largest value |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in errors.items():
        ratio = max(map(lambda ours, peer: ours / peer, values, errors["plain bf16"]))
        cells = (statistics.median(values), max(values), ratio, max(largest[name]))
        print(f"| {name} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")


def matrices() -> Iterator[torch.Tensor]:
    """Random float64 matrices: a few outliers, three levels, and logarithmic spectra."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    left, right = (
        torch.linalg.qr(torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)).Q
        for rows in (SIZE, WIDTH)
    )
    spectra = []
    for outliers in (1, 2, 4):
        for rest in torch.logspace(0, -3, 25).tolist():
            spectra.append(torch.full((SIZE,), rest, dtype=torch.float64))
            spectra[-1][:outliers] = 1
    for _ in range(40):
        level = torch.randint(0, 3, (SIZE,), generator=generator)
        spectra.append((10 ** (-3 * uniform(3)))[level])
    for _ in range(10):
        spectra.append(10 ** (-4 * uniform(1) * uniform(SIZE)))
    for values in spectra:
        yield (left * values) @ right.T


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Divided by the norm, in fp32."""
    norm: torch.Tensor = torch.linalg.vector_norm(x)
    return (x / (POLAR_EXPRESS_SAFETY * norm + 1e-7)).float()


def plain_bf16(x: torch.Tensor) -> torch.Tensor:
    """The iteration as it is written, every result rounded to bf16."""
    wide = rounded_bf16(normalized(x))
    for a, b, c in polar_express_coefficients(STEPS):
        gram = rounded_bf16(wide @ wide.T)
        polynomial = rounded_bf16(b * gram + c * gram @ gram)
        wide = rounded_bf16(a * wide + polynomial @ wide)
    return wide


def rounded_bf16(value: torch.Tensor) -> torch.Tensor:
    """To bf16 and back."""
    return value.bfloat16().float()


def on_gram(
    x: torch.Tensor, phases: Sequence[int], *, new_factor_left: bool = True
) -> torch.Tensor:
    """The iteration with a fresh X X^T before each phase of so many steps, in fp16."""
    coefficients = iter(polar_express_coefficients(STEPS))
    wide, scale = rounded_fp16(normalized(x) * SCALE), SCALE
    for steps in phases:
        gram, gram_scale = mirrored(wide @ wide.T), scale**2
        factor = None
        for step in range(steps):
            a, b, c = next(coefficients)
            polynomial = mirrored(
                c / gram_scale**2 * gram @ gram + b / gram_scale * gram + a * torch.eye(len(gram))
            )
            if step + 1 < steps:
                gram = mirrored(polynomial @ mirrored(gram @ polynomial) / gram_scale)
                gram_scale = 1.0
            if factor is None:
                factor = polynomial
            elif new_factor_left:
                factor = mirrored(polynomial @ factor)
            else:
                factor = mirrored(factor @ polynomial)
        assert factor is not None
        wide, scale = rounded_fp16(factor @ wide / scale), 1.0
    return wide


def rounded_fp16(value: torch.Tensor) -> torch.Tensor:
    """To fp16 and back; infinite results would fail the singular values, so they are cut off."""
    largest = torch.finfo(torch.float16).max
    return value.clamp(-largest, largest).half().float()


def mirrored(value: torch.Tensor) -> torch.Tensor:
    """The symmetric fp16 matrix of which a GPU computes the lower triangle."""
    lower = rounded_fp16(value).tril()
    return lower + lower.tril(-1).T


if __name__ == "__main__":
    main()
