"""Losses of a vocabulary that is split over processes are those of one process."""

from __future__ import annotations

import json

from tests.launch import run_python


def test_losses_and_gradients_are_those_of_one_process() -> None:
    finished = run_python("-m", "tests.parallel.split_vocabulary", processes=2)
    assert finished.returncode == 0, finished.stderr
    errors: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    assert len(errors) == 16
    for name, error in errors.items():
        assert error < 1e-6, name
