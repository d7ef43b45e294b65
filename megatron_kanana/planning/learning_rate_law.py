"""The learning rate of a token budget, from runs of a sweep (arXiv 2608.20061).

Runs with several learning rates are evaluated at several token counts of their stable phase. At
each token count a parabola through the losses, in the logarithm of the learning rate, has its
lowest point at the optimum; over the token counts the optima follow

    log(learning rate) = exponent * log(tokens) + intercept

by least squares, natural logarithms throughout. What does not look like that is said, not fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_LEARNING_RATES = 3  # a parabola has three coefficients
MIN_OPTIMA = 3  # two points fit a line whatever they are


class NoOptimumError(Exception):
    """Raised where losses have no minimum in the learning rate; says why."""


class NoLawError(Exception):
    """Raised where optima cannot be fitted; says why."""


@dataclass(frozen=True)
class Measurement:
    """Loss of one run at one point.

    Attributes:
        learning_rate: peak learning rate of the run.
        tokens: tokens the run had trained on.
        loss: held-out loss there, in nats a token; infinite or not a number if it had diverged.
    """

    learning_rate: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Parabola:
    """loss = curvature * (log(learning rate) - log(optimum))^2 + lowest.

    Attributes:
        optimum: learning rate with the lowest loss.
        lowest: that loss.
        curvature: of the loss over the natural logarithm of the learning rate.
        num_points: learning rates it went through.
    """

    optimum: float
    lowest: float
    curvature: float
    num_points: int

    def loss(self, learning_rate: float) -> float:
        """Loss at another learning rate."""
        distance = math.log(learning_rate / self.optimum)
        return self.curvature * distance**2 + self.lowest


@dataclass(frozen=True)
class Law:
    """log(learning rate) = exponent * log(tokens) + intercept.

    Attributes:
        exponent, intercept: the coefficients.
        r_squared: share of the variance of the optima's logarithms that the line explains.
        residual_std: standard deviation of the logarithms around the line, with n - 2 degrees of
            freedom.
        num_points: optima it was fitted to.
        mean_log_tokens: mean of log(tokens) over them.
        sum_of_squares: sum of squares of log(tokens) around that mean.
    """

    exponent: float
    intercept: float
    r_squared: float
    residual_std: float
    num_points: int
    mean_log_tokens: float
    sum_of_squares: float

    def learning_rate(self, tokens: float) -> float:
        """The learning rate for a token count."""
        return math.exp(self.exponent * math.log(tokens) + self.intercept)

    def band(self, tokens: float, confidence: float = 0.95) -> tuple[float, float]:
        """Where the line lies at a token count with that probability (Student's t).

        It supposes independent errors of equal size; points of one run that lie close together are
        not independent, and make it too narrow.
        """
        distance = math.log(tokens) - self.mean_log_tokens
        spread = math.sqrt(1 / self.num_points + distance**2 / self.sum_of_squares)
        half = student_t_quantile((1 + confidence) / 2, self.num_points - 2)
        factor = math.exp(half * self.residual_std * spread)
        middle = self.learning_rate(tokens)
        return middle / factor, middle * factor

    def exponent_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the exponent lies with that probability."""
        half = student_t_quantile((1 + confidence) / 2, self.num_points - 2)
        width = half * self.residual_std / math.sqrt(self.sum_of_squares)
        return self.exponent - width, self.exponent + width


@dataclass(frozen=True)
class Optima:
    """Parabolas of a sweep by token count, and why other token counts have none."""

    parabolas: Mapping[float, Parabola]
    without: Mapping[float, str]


def find_optima(measurements: Sequence[Measurement], nearest: int | None = None) -> Optima:
    """The best learning rate at each token count.

    Args:
        measurements: of all runs; losses of one learning rate at one token count are averaged.
        nearest: as for `fit_parabola`.
    """
    by_tokens: dict[float, list[Measurement]] = {}
    for measurement in measurements:
        by_tokens.setdefault(measurement.tokens, []).append(measurement)
    parabolas, without = {}, {}
    for tokens, those in sorted(by_tokens.items()):
        try:
            parabolas[tokens] = fit_parabola(_mean_losses(those), nearest)
        except NoOptimumError as error:
            without[tokens] = str(error)
    return Optima(parabolas, without)


def fit_parabola(losses: Mapping[float, float], nearest: int | None = None) -> Parabola:
    """The parabola through losses by learning rate; those that are not finite are left out.

    Args:
        losses: loss by learning rate.
        nearest: use only so many learning rates, those closest to the best one. Loss is a parabola
            near its minimum alone; None uses all.

    Raises:
        NoOptimumError: fewer than three finite losses, the best learning rate is the smallest or
            the largest one, the parabola opens downwards, or its minimum lies outside the rates.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if len(finite) < MIN_LEARNING_RATES:
        raise NoOptimumError(
            f"too few learning rates with a finite loss: {len(finite)}; a parabola needs"
            f" {MIN_LEARNING_RATES}"
        )
    best = min(finite, key=lambda rate: finite[rate])
    if best in (min(finite), max(finite)):
        edge = "smallest" if best == min(finite) else "largest"
        raise NoOptimumError(
            f"no interior minimum: the {edge} learning rate, {best:.4g}, has the lowest loss; try"
            f" {'smaller' if edge == 'smallest' else 'larger'} ones"
        )
    rates = sorted(finite, key=lambda rate: abs(math.log(rate / best)))[:nearest]
    rates.sort()
    if len(rates) < MIN_LEARNING_RATES:
        raise NoOptimumError(
            f"too few nearest learning rates: {nearest}; a parabola needs {MIN_LEARNING_RATES}"
        )
    x = np.log(np.array(rates) / best)
    a, b, c = np.polyfit(x, [finite[rate] for rate in rates], 2)
    if a <= 0:
        raise NoOptimumError("the parabola opens downwards: the losses do not rise on both sides")
    optimum = best * math.exp(-b / (2 * a))
    if not rates[0] <= optimum <= rates[-1]:
        raise NoOptimumError(
            f"no interior minimum: the parabola's lies at {optimum:.4g}, outside the learning rates"
            f" {rates[0]:.4g} to {rates[-1]:.4g}"
        )
    return Parabola(optimum, float(c - b**2 / (4 * a)), float(a), len(rates))


def fit_law(optima: Mapping[float, float]) -> Law:
    """The line through the logarithms of best learning rates by token count.

    Raises:
        NoLawError: fewer than three token counts.
    """
    if len(optima) < MIN_OPTIMA:
        raise NoLawError(
            f"too few token counts with an optimum: {len(optima)}; a line whose error is known"
            f" needs {MIN_OPTIMA}"
        )
    x, y = np.log(np.array(list(optima))), np.log(np.array(list(optima.values())))
    mean = float(x.mean())
    sum_of_squares = float(((x - mean) ** 2).sum())
    exponent = float(((x - mean) * (y - y.mean())).sum()) / sum_of_squares
    intercept = float(y.mean()) - exponent * mean
    residuals = float(((y - exponent * x - intercept) ** 2).sum())
    variance = float(((y - y.mean()) ** 2).sum())
    return Law(
        exponent=exponent,
        intercept=intercept,
        r_squared=1 - residuals / variance if variance > 0 else 0.0,
        residual_std=math.sqrt(residuals / (len(optima) - 2)),
        num_points=len(optima),
        mean_log_tokens=mean,
        sum_of_squares=sum_of_squares,
    )


def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Quantile of Student's t distribution, to about six digits.

    With t = sqrt(n) tan(angle) the density becomes cos(angle)^(n - 1), whose integral over a finite
    interval is computed on a grid and inverted.

    Args:
        probability: from 0.5 to less than 1.
        degrees_of_freedom: at least 1.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    areas = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(2 * probability - 1, areas / areas[-1], angles))
    return math.sqrt(degrees_of_freedom) * math.tan(angle)


def _mean_losses(measurements: Sequence[Measurement]) -> dict[float, float]:
    by_rate: dict[float, list[float]] = {}
    for measurement in measurements:
        by_rate.setdefault(measurement.learning_rate, []).append(measurement.loss)
    return {rate: sum(losses) / len(losses) for rate, losses in by_rate.items()}
