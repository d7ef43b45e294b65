"""Runs in turn under a time limit, told by a clock that goes on as runs say."""

from __future__ import annotations

import math

from benchmarks.turns import Clock, Curves, in_turn


class Trained:
    """Runs of `steps` steps that take `seconds[name]` each, and what was reported of them."""

    def __init__(self, limit: float | None, seconds: dict[str, float], steps: int = 10) -> None:
        self.now = 100.0
        self.clock = Clock(limit, lambda: self.now)
        self.seconds, self.steps = seconds, steps
        self.begun: list[tuple[str, int]] = []
        self.reported: list[tuple[Curves, list[str]]] = []

    def train(self, name: str, number: int) -> list[float]:
        self.begun.append((name, number))
        for step in range(self.steps):
            self.clock.check(f"{step} of {self.steps} steps done")
            if math.isinf(self.seconds[name]):
                raise RuntimeError("out of memory")
            self.now += self.seconds[name] / self.steps
        return [float(number)] * self.steps

    def run(self, count: int) -> tuple[dict[str, int], list[str]]:
        """Numbers of whole runs, and what was not run."""

        def keep(curves: Curves, notes: list[str]) -> None:
            self.reported.append(({name: list(c) for name, c in curves.items()}, list(notes)))

        in_turn(list(self.seconds), count, self.train, self.clock, keep)
        curves, notes = self.reported[-1]
        return {name: len(runs) for name, runs in curves.items()}, notes


def test_all_have_a_run_before_any_has_two_and_each_is_reported() -> None:
    trained = Trained(None, {"ours": 1.0, "peer": 2.0})
    assert trained.run(2) == ({"ours": 2, "peer": 2}, [])
    assert trained.begun == [("ours", 0), ("peer", 0), ("ours", 1), ("peer", 1)]
    assert [sum(map(len, curves.values())) for curves, _ in trained.reported] == [1, 2, 3, 4, 4]


def test_a_run_that_would_not_end_in_time_is_not_begun_and_a_shorter_one_is() -> None:
    trained = Trained(7.5, {"peer": 4.0, "ours": 1.0})
    runs, (note, *others) = trained.run(2)
    assert runs == {"peer": 1, "ours": 2} and not others
    assert note == "not run: peer, run 2 of 2: it would take 4 s, 2 s are left"


def test_a_run_that_is_out_of_time_is_not_counted_and_says_how_far_it_came() -> None:
    trained = Trained(7.0, {"ours": 4.0, "peer": 5.0})
    runs, notes = trained.run(1)
    assert runs == {"ours": 1, "peer": 0}
    assert notes == ["not run: peer, run 1 of 1, to its end: out of time, 6 of 10 steps done"]


def test_a_contender_for_which_no_time_is_left_is_not_begun() -> None:
    trained = Trained(4.0, {"ours": 5.0, "peer": 1.0})
    runs, notes = trained.run(1)
    assert runs == {"ours": 0, "peer": 0} and ("peer", 0) not in trained.begun
    assert notes[1] == "not run: peer, run 1 of 1: 0 s are left"


def test_a_contender_that_fails_leaves_the_reason_and_the_others_run() -> None:
    trained = Trained(None, {"peer": math.inf, "ours": 1.0})
    runs, notes = trained.run(3)
    assert runs == {"peer": 0, "ours": 3}
    assert notes == ["not run: peer, run 1 of 3 and later: RuntimeError: out of memory"]
    assert trained.begun.count(("peer", 0)) == 1
