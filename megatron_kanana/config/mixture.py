"""Which sources a run's samples come from: shares that may change with the tokens trained on."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from .data_settings import BlendEntry, DataSettings
from .proportions import Integers, Proportions

BUILTIN_WEIGHTS = {"python_standard_library": 0.9, "six_languages": 0.1}
"""The built-in text: its sources, and their share of the samples where `data.blend` is empty."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        name: what ledger, logs and `data.blend_changes` call it.
        paths: its indexed datasets; none for a source of the built-in text.
        weight: its share at the beginning of the run, relative to the others.
    """

    name: str
    paths: tuple[str, ...]
    weight: float


def source_name(entry: BlendEntry) -> str:
    """The source's name: the one given, else the last part of its first path."""
    paths = entry_paths(entry)
    return entry.source or (PurePath(paths[0]).name if paths else "")


def entry_paths(entry: BlendEntry) -> tuple[str, ...]:
    """The datasets of an entry; none where it means a source of the built-in text."""
    return (*([entry.path] if entry.path is not None else []), *entry.paths)


def sources(data: DataSettings) -> list[Source]:
    """The sources of a run, in the order of the settings; conversations are one."""
    if data.conversations:
        return [Source("conversations", (), 1.0)]
    if not data.blend:
        return [Source(name, (), weight) for name, weight in BUILTIN_WEIGHTS.items()]
    return [Source(source_name(entry), entry_paths(entry), entry.weight) for entry in data.blend]


class Mixture:
    """From the number of a sample to its source, and to its number within the source.

    Each source's own samples are taken one after another without gap or repetition, also where
    the shares change. Nothing is kept but one `Proportions` for each range of the run.

    Args:
        names: the sources.
        ranges: for each range of the run its first sample and a weight for each source; the first
            range begins at sample 0, the others in growing order.
    """

    def __init__(self, names: Sequence[str], ranges: Sequence[tuple[int, Sequence[float]]]) -> None:
        self.names = tuple(names)
        self._starts = [start for start, _ in ranges]
        self._proportions = [Proportions(weights) for _, weights in ranges]
        self._before = [np.zeros(len(self.names), dtype=np.int64)]
        for index, stop in enumerate(self._starts[1:]):
            counts = self._proportions[index].counts(stop - self._starts[index])
            self._before.append(self._before[index] + counts)

    @property
    def first_shares(self) -> tuple[float, ...]:
        """Each source's share of the samples at the beginning of the run."""
        return self._proportions[0].shares

    def place(self, sample: int) -> tuple[int, int]:
        """Which source a sample is from, and which of the source's samples it is, from 0."""
        index = self._range(sample)
        turn = sample - self._starts[index]
        owners, own_turns = self._proportions[index].window(turn, turn + 1)
        source = int(owners[0])
        return source, int(self._before[index][source] + own_turns[0])

    def counts(self, samples: int) -> Integers:
        """How many of the first `samples` samples come from each source, int64 [sources]."""
        index = self._range(samples)
        within = self._proportions[index].counts(samples - self._starts[index])
        return np.asarray(self._before[index] + within)

    def _range(self, sample: int) -> int:
        return bisect_right(self._starts, sample) - 1


def mixture(data: DataSettings) -> Mixture:
    """The mixture that the settings describe; a change holds from the first sample on that begins
    at its tokens or after them."""
    of_run = sources(data)
    names = [source.name for source in of_run]
    ranges = [(0, [source.weight for source in of_run])]
    for change in data.blend_changes:
        first = math.ceil(change.tokens / data.sequence_length)
        ranges.append((first, [change.weights.get(name, 0.0) for name in names]))
    return Mixture(names, ranges)


def tokens_by_source(
    data: DataSettings, consumed_samples: int, skipped: Iterable[tuple[int, int]] = ()
) -> dict[str, int]:
    """Tokens of each source among the first samples of a run, without the ranges skipped."""
    of_run = mixture(data)
    counts = of_run.counts(consumed_samples)
    for begin, end in skipped:
        counts = counts - (of_run.counts(end) - of_run.counts(begin))
    tokens = counts * data.sequence_length
    return dict(zip(of_run.names, map(int, tokens), strict=True))


def add_tokens(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Sums of two ledgers, source by source."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
