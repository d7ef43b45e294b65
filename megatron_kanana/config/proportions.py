"""Dealing a sequence out by weights, with direct access to any place of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Proportions:
    """An endless sequence in which each owner has its share of every beginning.

    The j-th turn (from 0) of an owner with share w is due at (j + 1/2) / w, and turns come in the
    order in which they are due, owners first that are named first: the Webster or Sainte-Laguë
    method of apportionment. Of the first n turns an owner has w n, within 1/2 + k w / 2 for k
    owners. Any place is found in a time that depends on k alone, so no list of turns is kept.

    Args:
        weights: one for each owner, in any unit; an owner of weight zero has no turn.

    Raises:
        ValueError: a weight is negative or not finite, or all are zero.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        given = np.array(weights, dtype=np.float64)
        if not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
            raise ValueError(f"weights must be at least zero, and not all zero: {list(weights)}")
        self._num_owners = len(given)
        self._owners = np.flatnonzero(given)
        self._shares = given[self._owners] / given.sum()

    @property
    def shares(self) -> tuple[float, ...]:
        """Each owner's share; together they are 1."""
        shares = np.zeros(self._num_owners)
        shares[self._owners] = self._shares
        return tuple(map(float, shares))

    def window(self, first: int, stop: int) -> tuple[Integers, Integers]:
        """The turns from `first` up to `stop`: whose each is, and which of its own, int64 each."""
        owners, own_turns, certain = self._near(first, stop)
        skipped = first - int(certain.sum())
        chosen = slice(skipped, skipped + stop - first)
        return self._owners[owners[chosen]], own_turns[chosen]

    def counts(self, turns: int) -> Integers:
        """How many of the first `turns` each owner has, int64 [owners]."""
        owners, _, certain = self._near(turns, turns)
        rest = owners[: turns - int(certain.sum())]
        counts = np.zeros(self._num_owners, dtype=np.int64)
        counts[self._owners] = certain + np.bincount(rest, minlength=len(certain))
        return counts

    def _near(self, first: int, stop: int) -> tuple[Integers, Integers, Integers]:
        """Turns that may lie in a window, in order, and how many of each owner come before them."""
        # The turn at place n is due between n - k/2 and n + k/2, since every owner's count differs
        # from its share of the time by at most 1/2. Two more turns cover ties and rounding.
        slack = len(self._shares) / 2
        begin = np.floor(self._shares * (first - slack)).astype(np.int64) - 2
        begin = np.maximum(begin, 0)
        end = np.ceil(self._shares * (stop + slack)).astype(np.int64) + 2
        lengths = end - begin
        owners = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.cumsum(lengths) - lengths
        own_turns = np.arange(len(owners)) - np.repeat(starts - begin, lengths)
        due = (own_turns + 0.5) / self._shares[owners]
        order = np.lexsort((owners, due))
        return owners[order], own_turns[order], begin
