"""Errors over several draws: which are called larger than a peer's by more than chance."""

from __future__ import annotations

import random
import re

import pytest

from benchmarks.error_draws import Errors, compared, is_larger_beyond_chance, summary

DRAWS = 16


def draws_with(factor: float, seed: int, spread: float = 0.05) -> list[Errors]:
    """Ours are `factor` times as large as the peer's, but for chance."""
    generator = random.Random(seed)
    return [
        {
            "ours": {"rms": factor * generator.lognormvariate(0, spread)},
            "peer": {"rms": generator.lognormvariate(0, spread)},
        }
        for _ in range(DRAWS)
    ]


def test_equals_are_seldom_called_larger_beyond_chance() -> None:
    called = [
        compared("case", draws_with(1.0, seed), "ours")[0].beyond_chance for seed in range(1000)
    ]
    assert sum(called) <= 40  # the sign test's own share of 16 draws is 1.06 %


def test_an_error_that_is_larger_by_more_than_its_spread_is_called_so() -> None:
    called = [
        compared("case", draws_with(1.2, seed), "ours")[0].beyond_chance for seed in range(100)
    ]
    assert sum(called) >= 97


def test_equal_numbers_say_nothing() -> None:
    assert not is_larger_beyond_chance([0.5] * DRAWS, [0.5] * DRAWS)
    assert not is_larger_beyond_chance([2.0] + [1.0] * 15, [1.0] * DRAWS)


def test_an_error_is_told_beside_the_peer_with_the_smallest_mean() -> None:
    draws = [
        {"ours": {"rms": 1.0}, "bad": {"rms": 3.0}, "good": {"rms": 0.5}},
        {"ours": {"rms": 2.0}, "bad": {"rms": 1.0}, "good": {"rms": 0.7}},
    ]
    (found,) = compared("case", draws, "ours")
    assert (found.row.ours, found.row.peer) == (1.5, "good")
    assert found.row.peer_value == pytest.approx(0.6)
    assert found.row.runs == 2


def test_contenders_that_fail_in_a_draw_are_left_out() -> None:
    draws = [
        {"ours": {"rms": 1.0}, "fails": {"rms": 0.1}, "peer": {"rms": 2.0}},
        {"ours": {"rms": 1.0}, "peer": {"rms": 2.0}},
    ]
    (found,) = compared("case", draws, "ours")
    assert found.row.peer == "peer"
    assert found.ratios.keys() == {"peer"}
    assert compared("case", draws, "fails") == []


def test_the_summary_gives_the_mean_ratio_to_each_peer() -> None:
    results = [
        found
        for seed in range(50)
        for found in compared(f"case {seed}", draws_with(0.9, seed), "ours")
    ]
    text = "\n".join(summary(results))
    mean, half = (float(x) for x in re.search(r"rms ([\d.]+) \+- ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert abs(mean - 0.9) < 2 * half < 0.02
    assert "50 of 50 mean errors are no larger" in text
