"""Predictions beside what was measured, and what they would be without each fitted figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_kanana.config.schema import OptimizerSettings

from .calibration import DEEPEP, KANANA
from .measured import ALL, PUBLISHED, SLICES
from .observation import GIB, Observation
from .own_cards import OURS, RATES
from .plan import plan

UPDATE_PARTS = ("update", "orthogonalisation", "messages: Muon")


@dataclass(frozen=True)
class Comparison:
    """One observation and its prediction.

    Attributes:
        observation: what was measured.
        predicted: in the observation's unit.
        left_out: the prediction by numbers fitted to the other observations alone; None where
            nothing was fitted to this one.
    """

    observation: Observation
    predicted: float
    left_out: float | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one; None without measurement."""
        measured = self.observation.measured
        return None if measured is None else self.predicted / measured - 1


def predict(observation: Observation) -> float:
    """The prediction of an observation, in its unit."""
    optimizer = OptimizerSettings(name=observation.optimizer, learning_rate=1e-3)
    found = plan(observation.job, optimizer, fp32_gradients=observation.fp32_gradients)
    if observation.quantity == "peak memory":
        return found.peak_memory / GIB
    if observation.quantity == "memory between steps":
        return found.memory[0].held / GIB
    if observation.quantity == "activations":
        return found.memory[0].activations / GIB
    if observation.quantity == "throughput":
        return found.flops_per_gpu / 1e12
    update = sum(found.parts[part] for part in UPDATE_PARTS)
    return {"passes": found.step - update, "update": update, "step": found.step}[
        observation.quantity
    ]


def compare(*, leave_one_out: bool = False) -> list[Comparison]:
    """All observations; with `leave_one_out`, which takes a minute, what fits without each."""
    return [
        Comparison(
            observation,
            predict(observation),
            _left_out(observation) if leave_one_out and observation.calibrated else None,
        )
        for observation in ALL
    ]


FITTED = ("host_layer", "host_stage", "host_time", "dispatch_hidden", "host_overlap")
"""What leaving one out fits again, in this order."""
_BEFORE = (5e-3, 10e-3, 1.0, 0.5, 4.0)
"""What would be assumed without any of the figures; pulls weakly, for what the rest leave open."""
_PULL = 1e-3
_SWEEPS = 3


def _left_out(observation: Observation) -> float | None:
    """The prediction after a fit to the other fitted figures: this version's, or all others'."""
    if observation.job.implementation.name == KANANA.name:
        if RATES not in observation.calibrated:
            return None
        rest = [each for each in OURS if RATES in each.calibrated and each is not observation]
        return predict_own(observation, fit_own(rest))
    used = [each for each in (*SLICES, *PUBLISHED) if each.calibrated]
    rest = [each for each in used if each is not observation]
    return predict(_with(observation, fit(rest)))


OWN_FITTED = ("host", "host_fp8", "matmul_fp8", "moving")
"""What `fit_own` fits: a factor of host_layer, host_moe and host_stage, and numbers of `KANANA`."""


def own_numbers() -> tuple[float, ...]:
    """The numbers of `OWN_FITTED` as `calibration` has them."""
    assert KANANA.matmul_fp8 is not None
    return 1.0, KANANA.host_fp8, KANANA.matmul_fp8, KANANA.moving


def predict_own(observation: Observation, numbers: Sequence[float]) -> float:
    """The prediction of a figure of this version with other numbers of `OWN_FITTED`."""
    host, host_fp8, matmul_fp8, moving = numbers
    job = observation.job
    implementation = dataclasses.replace(
        job.implementation,
        host_layer=host * KANANA.host_layer,
        host_moe=host * KANANA.host_moe,
        host_stage=host * KANANA.host_stage,
        host_fp8=host_fp8,
        matmul_fp8=matmul_fp8,
        moving=moving,
    )
    job = dataclasses.replace(job, implementation=implementation)
    return predict(dataclasses.replace(observation, job=job))


def fit_own(observations: Sequence[Observation]) -> tuple[float, ...]:
    """The numbers of `OWN_FITTED` with the least squares of log errors, one after another."""
    before = own_numbers()

    def loss(numbers: Sequence[float]) -> float:
        total = 0.0
        for observation in observations:
            assert observation.measured is not None
            total += math.log(predict_own(observation, numbers) / observation.measured) ** 2
        for number, other in zip(numbers, before, strict=True):
            total += _PULL * math.log(number / other) ** 2
        return total

    return _descend(loss, before, 0.7)


def fit(observations: Sequence[Observation]) -> tuple[float, ...]:
    """The numbers of `FITTED` with the least squares of log errors, one after another."""

    def loss(values: Sequence[float]) -> float:
        total = 0.0
        for observation in observations:
            assert observation.measured is not None
            predicted = predict(_with(observation, values))
            total += math.log(predicted / observation.measured) ** 2
        for value, before in zip(values, _BEFORE, strict=True):
            total += _PULL * math.log(value / before) ** 2
        return total

    hidden = FITTED.index("dispatch_hidden")
    values = _descend(loss, _BEFORE, 1.5)
    return (*values[:hidden], min(values[hidden], 0.99), *values[hidden + 1 :])


def _descend(
    loss: Callable[[Sequence[float]], float], before: Sequence[float], most: float
) -> tuple[float, ...]:
    """Numbers with the least loss, one after another, each sought within factors of exp(most)."""
    values = list(before)
    for _ in range(_SWEEPS):
        for index in range(len(values)):

            def along(factor: float, index: int = index) -> float:
                trial = list(values)
                trial[index] = values[index] * math.exp(factor)
                return loss(trial)

            values[index] *= math.exp(_minimum(along, -most, most))
    return tuple(values)


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one minimum is smallest, to a hundredth (golden section)."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 0.02:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _with(observation: Observation, values: Sequence[float]) -> Observation:
    """The observation under other fitted numbers."""
    layer, stage, host_time, hidden, overlap = values
    job = observation.job
    machine = job.machine
    if job.implementation is DEEPEP:  # a cluster's node, not the slices' machine
        machine = dataclasses.replace(machine, host_time=host_time)
    return dataclasses.replace(
        observation,
        job=dataclasses.replace(
            job,
            machine=machine,
            implementation=dataclasses.replace(
                job.implementation, host_layer=layer, host_stage=stage
            ),
            efficiencies=dataclasses.replace(
                job.efficiencies, dispatch_hidden=min(hidden, 0.99), host_overlap=overlap
            ),
        ),
    )
