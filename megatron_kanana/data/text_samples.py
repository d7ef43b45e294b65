"""Sampling documents from several sources by weight, up to a number of bytes, by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .documents import read_documents

PIECE_CHARACTERS = 4096


@dataclass(frozen=True)
class Source:
    """Text of one language.

    Attributes:
        language: any name; several sources may share one.
        path: file that `read_documents` reads.
        weight: share of the sampled bytes, relative to the other sources' weights.
    """

    language: str
    path: Path
    weight: float


@dataclass(frozen=True)
class Share:
    """What is taken from a source.

    Attributes:
        available: bytes that its documents have.
        whole_passes: times that everything is taken.
        largest_rank: a piece is taken once more if its rank, uint64, is at most this; -1 for none.
        num_bytes: taken in all.
    """

    available: int
    whole_passes: int
    largest_rank: int
    num_bytes: int


class WeightedSample:
    """Text of sources in the shares that their weights give.

    Documents are taken in pieces of whole lines, at most `PIECE_CHARACTERS` long. A source with
    less text than its share is repeated: whole passes, then part of one. Which pieces belong to
    that part depends on the seed, the source's place in the list and the piece's place in the
    source. Sources are read twice, and 16 bytes are kept for each piece.

    Attributes:
        sources: as given.
        shares: of each source.
        seed: as given.

    Args:
        sources: at least one.
        max_bytes: UTF-8 bytes to take in all, to within a piece of each source; None takes as
            many as there are.
        seed: of the choice.
        text_key: field or column that holds the text.

    Raises:
        ValueError: a weight or `max_bytes` is not above 0, or a source cannot be read, is empty,
            or its share is less than a piece.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        max_bytes: int | None = None,
        seed: int = 0,
        text_key: str = "text",
    ) -> None:
        for source in sources:
            if not 0 < source.weight < float("inf"):
                raise ValueError(f"{source.path}: weight {source.weight} is not above 0")
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"{max_bytes} bytes are not above 0")
        self.sources = tuple(sources)
        self.seed, self._text_key = seed, text_key
        measured = [self._measure(number) for number in range(len(sources))]
        total = max_bytes or sum(int(sizes.sum()) for sizes, _ in measured)
        weights = sum(source.weight for source in sources)
        self.shares = tuple(
            _share(sizes, ranks, round(total * source.weight / weights))
            for source, (sizes, ranks) in zip(sources, measured, strict=True)
        )
        for source, share in zip(sources, self.shares, strict=True):
            if not share.num_bytes:
                raise ValueError(f"{source.path}: its share is too small to take anything of it")

    def __iter__(self) -> Iterator[str]:
        """The pieces, source after source, pass after pass."""
        for number, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            for _ in range(share.whole_passes):
                yield from self._pieces(source.path)
            if share.largest_rank >= 0:
                rank = self._ranker(number)
                for index, text in enumerate(self._pieces(source.path)):
                    if rank(index) <= share.largest_rank:
                        yield text

    def _measure(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Sizes in bytes and ranks of a source's pieces."""
        path = self.sources[number].path
        sizes = [len(text.encode()) for text in self._pieces(path)]
        if not sizes:
            raise ValueError(f"{path} has no document")
        rank = self._ranker(number)
        ranks = np.fromiter((rank(index) for index in range(len(sizes))), np.uint64, len(sizes))
        return np.array(sizes, dtype=np.int64), ranks

    def _pieces(self, path: Path) -> Iterator[str]:
        for text in read_documents(path, self._text_key):
            yield from cut_text(text)

    def _ranker(self, number: int) -> Callable[[int], int]:
        """Place of a piece, by its index, in the random order of source `number`."""
        start = hashlib.blake2b(f"{self.seed}/{number}/".encode(), digest_size=8)

        def rank(index: int) -> int:
            state = start.copy()
            state.update(index.to_bytes(8, "little"))
            return int.from_bytes(state.digest(), "little")

        return rank


def cut_text(text: str, length: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of at most `length` characters, after a line break or else a space."""
    start = 0
    while len(text) - start > length:
        end = start + length
        cuts = (text.rfind(blank, start, end) + 1 for blank in ("\n", " "))
        end = next((cut for cut in cuts if cut > start), end)
        yield text[start:end]
        start = end
    yield text[start:]


def _share(sizes: npt.NDArray[np.int64], ranks: npt.NDArray[np.uint64], wanted: int) -> Share:
    """The pieces whose sizes come closest to `wanted` bytes."""
    available = int(sizes.sum())
    passes, rest = divmod(wanted, available)
    order = np.argsort(ranks)
    reached = np.concatenate(([0], np.cumsum(sizes[order])))
    count = int(np.argmin(np.abs(reached - rest)))
    if count == len(order):
        passes, count = passes + 1, 0
    largest_rank = int(ranks[order[count - 1]]) if count else -1
    return Share(available, passes, largest_rank, passes * available + int(reached[count]))
