"""Processes are killed or frozen at random instants: the run ends as if nothing had happened.

The long form is `python -m tests.faults.campaign`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, Result

STEPS = 14  # the batch grows at the 11th, the mixture changes during the 13th

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Campaign]:
    """With a seed of its own at each run of the tests, which a failure prints."""
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")
    yield Campaign(tmp_path_factory.mktemp("faults"), seed, cache_dir, STEPS)


@pytest.mark.parametrize(("layout", "kills"), [("ep2", 4), ("pp2", 3)])
def test_killed_runs_end_as_the_undisturbed_one(
    layout: str, kills: int, campaign: Campaign
) -> None:
    result = Result()
    campaign.kill(layout, kills, result)
    assert not result.problems, f"seed {campaign.seed}"
    assert len(result.kills) == kills


def test_a_frozen_rank_is_named_killed_and_the_run_ends_as_the_undisturbed_one(
    campaign: Campaign,
) -> None:
    result = Result()
    campaign.freeze("ep2", 1, result)
    assert not result.problems, f"seed {campaign.seed}"
    assert len(result.noticed) == 1
    (report,) = campaign.folder.glob("runs/ep2_frozen_0/hangs/*/report.txt")
    (freeze,) = result.freezes
    other = 1 - freeze.rank
    waiting = re.search(
        rf"rank {other} waits in .*, (?:called|waited for) at (\S+?):(\d+) ", report.read_text()
    )
    assert waiting
    stacks = (report.parent / f"stacks_of_rank_{other}.txt").read_text()
    assert re.search(rf'{waiting[1]}", line {waiting[2]}\b', stacks)
    assert not (report.parent / f"stacks_of_rank_{freeze.rank}.txt").exists()
