"""Loss spikes by median and median absolute deviation, beside numpy and on losses as they come."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_kanana.training.spikes import SpikeDetector

THRESHOLD = 10.0
MINIMUM_RISE = 0.05


def detector(window: int) -> SpikeDetector:
    return SpikeDetector(window, THRESHOLD, MINIMUM_RISE)


def learning_curve(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Losses that fall as a power law, with noise of tails a little heavier than normal."""
    fall = 2.0 + 6.0 * (1.0 + np.arange(steps)) ** -0.3
    return np.asarray(fall * (1.0 + 0.01 * rng.standard_t(10, steps)))


@pytest.mark.parametrize("window", [8, 31, 128])
def test_the_limit_is_that_of_numpys_medians(window: int) -> None:
    rng = np.random.default_rng(window)
    spikes = detector(window)
    values = rng.normal(3.0, 0.5, 3 * window)
    for number, value in enumerate(values):
        if number >= window // 4:
            last = values[max(0, number - window) : number]
            middle = np.median(last)
            deviation = 1.4826 * np.median(np.abs(last - middle))
            expected = middle + max(THRESHOLD * deviation, MINIMUM_RISE * middle)
            assert spikes.limit() == pytest.approx(expected, rel=1e-12)
        else:
            assert spikes.limit() == math.inf
        spikes.remember(float(value))


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_noisy_loss_gives_no_alarm_and_a_jump_of_a_half_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spikes = detector(128)
    for value in learning_curve(rng, 5000):
        assert value <= spikes.limit()
        spikes.remember(float(value))
    assert spikes.limit() < 1.5 * spikes.values[-1]


def test_a_quarter_of_spikes_does_not_hide_the_next_one() -> None:
    rng = np.random.default_rng(0)
    spikes = detector(64)
    for number, value in enumerate(rng.normal(3.0, 0.03, 200)):
        spike = number % 4 == 3 and number > 100
        found = value * (2.0 if spike else 1.0)
        assert (found > spikes.limit()) == spike
        spikes.remember(float(found))


def test_what_is_restored_goes_on_as_the_one_it_was_taken_from() -> None:
    rng = np.random.default_rng(1)
    one, other = detector(16), detector(16)
    for value in rng.normal(3.0, 0.1, 40):
        one.remember(float(value))
    other.restore(one.values)
    for value in rng.normal(3.0, 0.1, 20):
        assert one.limit() == other.limit()
        one.remember(float(value))
        other.remember(float(value))
