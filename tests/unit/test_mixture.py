"""Shares of the sources: what each sample is, at any place of a run and however long it is."""

from __future__ import annotations

import heapq
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from megatron_kanana.config.data_settings import BlendChange, BlendEntry, DataSettings
from megatron_kanana.config.mixture import Mixture, mixture, sources, tokens_by_source
from megatron_kanana.config.proportions import Proportions

LENGTH = 4096
NAMES = ("english", "math_stem", "code", "multilingual")
FIRST, LATER = (45.0, 12.5, 27.5, 15.0), (22.5, 27.5, 25.0, 25.0)
SWITCH = math.ceil(6e12 / LENGTH)


def published() -> DataSettings:
    """Kanana-2's mixture."""
    entries = zip(NAMES, FIRST, strict=True)
    return DataSettings(
        sequence_length=LENGTH,
        blend=[BlendEntry(source=name, path=name, weight=weight) for name, weight in entries],
        blend_changes=[BlendChange(tokens=6e12, weights=dict(zip(NAMES, LATER, strict=True)))],
    )


def in_turn(weights: list[int], count: int) -> list[tuple[int, int]]:
    """The order by definition, in exact fractions: each turn when it is due, one by one."""
    due = [(Fraction(1, 2) / w, owner, 0) for owner, w in enumerate(weights) if w]
    heapq.heapify(due)
    order = []
    for _ in range(count):
        _, owner, turn = heapq.heappop(due)
        order.append((owner, turn))
        heapq.heappush(due, ((turn + Fraction(3, 2)) / weights[owner], owner, turn + 1))
    return order


@pytest.mark.parametrize("num_owners", [1, 2, 5, 40])
def test_turns_come_when_they_are_due(num_owners: int) -> None:
    generator = random.Random(num_owners)
    weights = [generator.choice([0, 1, 3, 50, 997]) for _ in range(num_owners - 1)] + [1]
    expected = in_turn(weights, 3000)
    proportions = Proportions(weights)
    owners, turns = proportions.window(0, 3000)
    assert list(zip(owners, turns, strict=True)) == expected
    for place in generator.sample(range(3000), 100):
        owners, turns = proportions.window(place, place + 1)
        assert (owners[0], turns[0]) == expected[place]
        counted = [
            sum(owner == each for owner, _ in expected[:place]) for each in range(num_owners)
        ]
        assert list(proportions.counts(place)) == counted


def test_places_far_away_fit_together() -> None:
    generator = np.random.default_rng(0)
    proportions = Proportions(list(generator.exponential(size=7)))
    for start in generator.integers(10**9, 10**13, 20):
        owners, turns = proportions.window(int(start), int(start) + 300)
        before, after = proportions.counts(int(start)), proportions.counts(int(start) + 300)
        assert before.sum() == start
        for owner in range(7):
            mine = turns[owners == owner]
            assert list(mine) == list(range(before[owner], after[owner]))
        wanted = np.array(proportions.shares) * float(start)
        assert np.abs(before - wanted).max() <= 0.5 + 7 / 2


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [math.nan]])
def test_weights_that_give_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be"):
        Proportions(weights)


def test_kanana_2s_shares_are_realised_within_a_thousandth_after_a_million_samples() -> None:
    of_run = mixture(published())
    for start, shares in ((0, FIRST), (SWITCH, LATER)):
        counts = of_run.counts(start + 10**6) - of_run.counts(start)
        assert counts.sum() == 10**6
        assert counts / 10**6 == pytest.approx(np.array(shares) / 100, abs=1e-5)


def test_kanana_2s_switch_comes_with_the_first_sample_that_begins_at_six_trillion_tokens() -> None:
    of_run = mixture(published())
    assert (SWITCH - 1) * LENGTH < 6e12 <= SWITCH * LENGTH
    without = published()
    without.blend_changes = []
    unchanged = mixture(without)
    later = Mixture(NAMES, [(0, LATER)])
    before = of_run.counts(SWITCH)
    for sample in range(SWITCH - 500, SWITCH):
        assert of_run.place(sample) == unchanged.place(sample)
    for sample in range(SWITCH, SWITCH + 500):
        source, index = later.place(sample - SWITCH)
        assert of_run.place(sample) == (source, before[source] + index)


@pytest.mark.parametrize("seed", range(5))
def test_each_source_goes_on_where_it_was_through_every_change(seed: int) -> None:
    generator = random.Random(seed)
    starts = [0, *sorted(generator.sample(range(1, 900), 4)), 900]
    weights = [[generator.choice([0.0, 0.5, 1, 8]) for _ in range(4)] + [1] for _ in starts]
    of_run = Mixture("abcde", list(zip(starts, weights, strict=True)))
    taken = [0] * 5
    for sample in range(1000):
        assert list(of_run.counts(sample)) == taken
        source, index = of_run.place(sample)
        assert index == taken[source]
        taken[source] += 1
        part = max(number for number, start in enumerate(starts) if start <= sample)
        assert weights[part][source] > 0


def test_names_come_from_source_path_or_the_built_in_text() -> None:
    data = DataSettings(sequence_length=8)
    assert [(s.name, s.paths) for s in sources(data)] == [
        ("python_standard_library", ()),
        ("six_languages", ()),
    ]
    data.blend = [BlendEntry(path="a/web"), BlendEntry(source="code", paths=["b/x", "b/y"])]
    assert [(s.name, s.paths) for s in sources(data)] == [
        ("web", ("a/web",)),
        ("code", ("b/x", "b/y")),
    ]
    assert tokens_by_source(data, 10) == {"web": 40, "code": 40}
