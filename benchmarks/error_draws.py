"""Errors of several contenders on the same random draws, and which are larger by more than chance.

Where two round the same number of times, but differently, either's error may be the larger one on
given inputs. So each case is drawn several times: the errors told are means over the draws, and an
error is larger than a peer's beyond chance where it is so in nearly every draw (sign test).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from .card import Row

Errors = dict[str, dict[str, float]]
"""Of one draw: by contender and kind, the error."""

CHANCE = 0.025  # how rarely equals may differ as much: one side of a 95 % interval


@dataclasses.dataclass
class Compared:
    """One kind of error of one case: ours beside the peer with the smallest mean.

    Attributes:
        ratios: of each draw: logarithm of our error over each peer's, by peer.
        beyond_chance: our mean is larger than that peer's, and so are nearly all our draws.
    """

    row: Row
    kind: str
    ratios: dict[str, list[float]]
    beyond_chance: bool


def is_larger_beyond_chance(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Sign test of paired draws: equal ones say nothing."""
    larger = sum(a > b for a, b in zip(ours, theirs, strict=True))
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    tail = sum(math.comb(differ, k) for k in range(larger, differ + 1)) / 2**differ
    return tail < CHANCE and statistics.mean(ours) > statistics.mean(theirs)


def compared(
    case: str, draws: Sequence[Errors], contender: str, suffix: str = ""
) -> list[Compared]:
    """A row a kind of error of `contender`, beside the best of those that are not "ours".

    Args:
        draws: contenders that some of them lack are left out.
        suffix: of the rows' names.
    """
    found: list[Compared] = []
    names = [name for name in draws[0] if all(name in draw for draw in draws)]
    if contender not in names:
        return found
    for kind in draws[0][contender]:
        ours = [draw[contender][kind] for draw in draws]
        beside = {
            peer: [draw[peer][kind] for draw in draws]
            for peer in names
            if not peer.startswith("ours") and math.isfinite(draws[0][peer].get(kind, math.nan))
        }
        mean = statistics.mean(ours)
        row = Row(f"{case}: {kind}{suffix}", "relative", mean, runs=len(draws))
        beyond_chance = False
        if beside:
            row.peer = min(beside, key=lambda peer: statistics.mean(beside[peer]))
            row.peer_value = statistics.mean(beside[row.peer])
            row.ratio = row.peer_value / mean if mean > 0 else None
            beyond_chance = is_larger_beyond_chance(ours, beside[row.peer])
        ratios = {
            peer: [math.log(a / b) for a, b in zip(ours, theirs, strict=True) if a > 0 and b > 0]
            for peer, theirs in beside.items()
        }
        found.append(Compared(row, kind, ratios, beyond_chance))
    return found


def summary(results: Sequence[Compared]) -> list[str]:
    """How many errors are no larger than the best peer's, where others are, and means by kind."""
    beside = [result for result in results if result.row.peer_value]
    no_larger = sum(_ratio(result) <= 1 for result in beside)
    larger = sorted((r for r in beside if r.beyond_chance), key=_ratio, reverse=True)
    text = (
        f"{no_larger} of {len(beside)} mean errors are no larger than the best peer's, "
        f"{len(beside) - len(larger)} but for chance (sign test of the draws; among equals up to "
        f"{CHANCE * len(beside):.0f} would be called larger)"
    )
    for result in larger[:8]:
        row = result.row
        text += f"; {row.name}: {row.ours:.3e}, {_ratio(result):.3f} of {row.peer}'s"
    return [text, *means_by_kind(results)]


def _ratio(result: Compared) -> float:
    assert result.row.peer_value
    return result.row.ours / result.row.peer_value


def means_by_kind(results: Sequence[Compared]) -> list[str]:
    """Geometric means, over cases and draws, of our error over each peer's."""
    by_peer: dict[str, dict[str, list[list[float]]]] = {}
    for result in results:
        for peer, ratios in result.ratios.items():
            if ratios:
                by_peer.setdefault(peer, {}).setdefault(result.kind, []).append(ratios)
    notes = []
    for peer, kinds in by_peer.items():
        told = []
        for kind, cases in kinds.items():
            ratios = [ratio for case in cases for ratio in case]
            mean = statistics.mean(ratios)
            # Draws of a case share nothing; cases may differ, which their own means leave out.
            spread = [r - statistics.mean(case) for case in cases for r in case]
            error = statistics.pstdev(spread) / math.sqrt(len(spread))
            told.append(f"{kind} {math.exp(mean):.4f} +- {1.96 * error:.4f}")
        notes.append(f"geometric mean of our error over {peer}'s: " + ", ".join(told))
    return notes
