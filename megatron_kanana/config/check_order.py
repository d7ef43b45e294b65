"""Changes during a run, which come one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from .problems import Problem


def check_growing_tokens(setting: str, tokens: Sequence[float]) -> Iterator[Problem]:
    """Each change of a list comes after the one before it.

    Args:
        setting: name of the list.
        tokens: trained on when each change of it begins to hold.
    """
    for index, (before, after) in enumerate(pairwise(tokens)):
        if before >= after:
            yield Problem(
                f"{setting}[{index + 1}].tokens",
                after,
                f"does not come after the change before it, at {before} tokens",
                "give the changes by growing tokens",
            )
