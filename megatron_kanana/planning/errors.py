"""Predictions beside what was measured, and what they would be without each fitted figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_kanana.config.schema import OptimizerSettings

from .calibration import DEEPEP
from .measured import (
    ALL,
    GIB,
    HOST_EXPERT_OF_TORCH,
    OURS,
    PUBLISHED,
    SLICES,
    Observation,
)
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
    if observation.quantity == "activations":
        return found.memory[0].activations / GIB
    if observation.quantity == "throughput":
        return found.flops_per_gpu / 1e12
    if observation.quantity == "passes":
        return found.step - sum(found.parts[part] for part in UPDATE_PARTS)
    return found.step


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
    if HOST_EXPERT_OF_TORCH in observation.calibrated:
        ours = [each for each in OURS if each.calibrated and each is not observation]
        return predict(with_host_expert(observation, fit_host_expert(ours)))
    used = [each for each in (*SLICES, *PUBLISHED) if each.calibrated]
    rest = [each for each in used if each is not observation]
    return predict(_with(observation, fit(rest)))


def fit_host_expert(observations: Sequence[Observation]) -> float:
    """This version's seconds to launch an expert, with the least squares of log errors."""

    def loss(factor: float) -> float:
        return sum(
            math.log(predict(with_host_expert(each, 1e-3 * math.exp(factor))) / each.measured) ** 2
            for each in observations
            if each.measured is not None
        )

    return 1e-3 * math.exp(_minimum(loss, -1.0, 1.0))


def with_host_expert(observation: Observation, seconds: float) -> Observation:
    """The observation where launching an expert takes so long."""
    job = observation.job
    host_expert = dict.fromkeys(job.implementation.host_expert, seconds)
    implementation = dataclasses.replace(job.implementation, host_expert=host_expert)
    return dataclasses.replace(
        observation, job=dataclasses.replace(job, implementation=implementation)
    )


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

    values = list(_BEFORE)
    for _ in range(_SWEEPS):
        for index in range(len(values)):

            def along(factor: float, index: int = index) -> float:
                trial = list(values)
                trial[index] = values[index] * math.exp(factor)
                return loss(trial)

            values[index] *= math.exp(_minimum(along, -1.5, 1.5))
            if FITTED[index] == "dispatch_hidden":
                values[index] = min(values[index], 0.99)
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
